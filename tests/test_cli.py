"""The command line: what it reads, what it prints, and what its exit status says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from alknet_firewall import __version__
from alknet_firewall.cli import main
from alknet_firewall.detector import CODEBOOK, FILES, MANIFEST
from click.testing import CliRunner
from tiny_detector import ATTACK, BENIGN, ORDER

CLEAR, SUSPICIOUS, DANGEROUS, ERROR, USAGE = 0, 10, 20, 1, 2


@pytest.fixture
def run(tiny_folder, monkeypatch):
    """Run a command on the tiny detector."""
    monkeypatch.setenv("ALKNET_DETECTOR", str(tiny_folder))

    def run(*arguments: object, input: str | bytes | None = None):
        return CliRunner().invoke(main, [str(a) for a in arguments], input=input)

    return run


@pytest.fixture
def folder(tmp_path):
    """Two ordinary files and, further down, an attack."""
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "texts" / "a.txt").write_text(BENIGN[0])
    (tmp_path / "texts" / "b.md").write_text(BENIGN[6], encoding="utf-8-sig")
    (tmp_path / "texts" / "deep" / "c.txt").write_text(f"{BENIGN[0]}\n{ATTACK}\n")
    return tmp_path / "texts"


class TestScreen:
    @pytest.mark.parametrize(
        ("text", "status", "level"),
        [(BENIGN[0], CLEAR, "CLEAR"), (ATTACK, DANGEROUS, "DANGEROUS"), ("", CLEAR, "CLEAR")],
    )
    def test_an_argument_is_the_text(self, run, text, status, level):
        result = run("screen", text)
        assert result.exit_code == status, result.output
        assert result.output.startswith(level)

    def test_what_was_not_read_is_suspicious(self, run, monkeypatch):
        monkeypatch.setenv("ALKNET_MAX_TOKENS", "5")
        result = run("screen", BENIGN[0])
        assert result.exit_code == SUSPICIOUS
        assert "max_tokens" in result.output

    def test_the_worst_text_counts(self, run):
        result = run("screen", BENIGN[0], ATTACK, BENIGN[1])
        assert result.exit_code == DANGEROUS
        levels = [line.split()[0] for line in result.output.splitlines() if line[0] != " "]
        assert levels == ["CLEAR", "DANGEROUS", "CLEAR"]

    def test_a_file(self, run, folder):
        result = run("screen", folder / "a.txt")
        assert result.exit_code == CLEAR
        assert str(folder / "a.txt") in result.output

    def test_a_folder_is_read_to_its_depth(self, run, folder):
        result = run("screen", folder)
        assert result.exit_code == DANGEROUS
        for name in ("a.txt", "b.md", "c.txt"):
            assert name in result.output

    def test_standard_input_is_the_default(self, run):
        assert run("screen", input=ATTACK).exit_code == DANGEROUS
        assert run("screen", "-", input=BENIGN[0]).exit_code == CLEAR
        assert run("screen", "-", BENIGN[0], input=ATTACK).exit_code == DANGEROUS

    def test_a_byte_order_mark_is_no_text(self, run, tmp_path):
        (tmp_path / "empty.txt").write_bytes(b"\xef\xbb\xbf")
        result = run("screen", "--json", tmp_path / "empty.txt")
        assert json.loads(result.output)["reason"] == "the text is empty"

    def test_the_origin(self, run):
        assert run("screen", "--origin", "user", ORDER).exit_code == CLEAR
        assert run("screen", "--origin", "document", ORDER).exit_code == DANGEROUS

    def test_the_detector(self, run, tiny_folder, monkeypatch):
        monkeypatch.delenv("ALKNET_DETECTOR")
        assert run("screen", "--detector", tiny_folder, ATTACK).exit_code == DANGEROUS

    def test_json_is_one_object_a_line(self, run, folder):
        result = run("screen", "--json", folder, BENIGN[6])
        objects = [json.loads(line) for line in result.output.splitlines()]
        assert [o.get("input", "")[-5:] for o in objects] == ["a.txt", "/b.md", "c.txt", ""]
        assert objects[2]["level"] == "DANGEROUS"
        span = objects[2]["spans"][0]
        assert ATTACK in f"{BENIGN[0]}\n{ATTACK}\n"[span["start"] : span["end"]]
        assert result.exit_code == DANGEROUS

    @pytest.mark.parametrize("option", [(), ("--json",)])
    def test_a_file_name_that_is_not_utf8(self, run, tmp_path, option):
        path = os.fsencode(tmp_path / "a") + b"\xff"
        with open(path, "w") as file:
            file.write(ATTACK)
        result = run("screen", *option, os.fsdecode(path))
        assert result.exit_code == DANGEROUS, result.output

    def test_spans_quote_the_text(self, run):
        result = run("screen", "--spans", f"{BENIGN[0]} {ATTACK}")
        assert ATTACK in result.output
        assert ATTACK not in run("screen", f"{BENIGN[0]} {ATTACK}").output

    def test_a_hostile_text_does_not_reach_the_terminal(self, run):
        hostile = f"{ATTACK}\x1b[2J\x07\x9b1m{ATTACK}"
        result = CliRunner().invoke(main, ["screen", "--spans", hostile], color=True)
        assert "\x1b[2J" not in result.output
        assert not {"\x07", "\x9b"} & set(result.output)

    def test_a_huge_argument_is_a_text(self, run):
        assert run("screen", "a" * 100_000).exit_code == CLEAR

    def test_an_argument_that_can_name_no_file_is_a_text(self, run):
        assert run("screen", "a\x00b").exit_code == CLEAR
        assert run("screen", "a" * 300 + "/b.txt").exit_code == CLEAR

    @pytest.mark.parametrize("text", ["mail.txt", "folder/mail", ATTACK + ".txt", "-", ""])
    def test_text_is_never_a_path(self, run, tmp_path, monkeypatch, text):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "mail.txt").write_text(ATTACK)
        result = run("screen", "--text", text)
        assert result.exit_code == (DANGEROUS if ATTACK in text else CLEAR), result.output

    def test_text_that_begins_with_a_dash_follows_two(self, run):
        assert run("screen", "--text", "--", f"--help {ATTACK}").exit_code == DANGEROUS
        assert run("screen", "--", "--help", ATTACK).exit_code == DANGEROUS

    @pytest.mark.parametrize(
        "text", ["Hello.", "3.14", "Hello...", "wait...what?", "你好。", "a.txt b"]
    )
    def test_words_that_are_no_path(self, run, text):
        assert run("screen", text).exit_code == CLEAR


class TestNotScreened:
    """What cannot be screened is named, and the rest is screened all the same."""

    def test_in_a_folder(self, run, folder, tmp_path, monkeypatch):
        (tmp_path / "elsewhere").mkdir()
        (folder / "to_folder").symlink_to(tmp_path / "elsewhere")
        (folder / "to_file").symlink_to(folder / "a.txt")
        (folder / "broken").symlink_to("nowhere")
        (folder / "latin1.txt").write_bytes(b"Gr\xfc\xdfe")
        (folder / "closed").mkdir()
        os.mkfifo(folder / "pipe")
        listed = Path.iterdir

        def iterdir(path):  # For root too, who may look into every folder.
            if path.name == "closed":
                raise PermissionError(13, "Permission denied")
            return listed(path)

        monkeypatch.setattr(Path, "iterdir", iterdir)
        result = run("screen", folder)
        assert result.exit_code == DANGEROUS
        assert [line.split()[-1] for line in result.stdout.splitlines() if line[0] != " "] == [
            str(folder / name) for name in ("a.txt", "b.md", "deep/c.txt", "to_file")
        ]
        problems = [line.removeprefix(f"Error: {folder}/") for line in result.stderr.splitlines()]
        assert problems == [
            "broken: cannot be read: No such file or directory",
            "closed: cannot be read: Permission denied",
            "latin1.txt: not UTF-8 text (byte 2): convert it before screening",
            "pipe: not a regular file",
            "to_folder: a link to a folder, which is not followed: name it itself",
        ]
        (folder / "deep" / "c.txt").unlink()
        assert run("screen", folder).exit_code == ERROR

    def test_among_arguments(self, run, folder):
        (folder / "broken").symlink_to("nowhere")
        bad = ("text\ud800", folder / "broken")
        result = run("screen", *bad, folder / "a.txt", ATTACK)
        assert result.exit_code == DANGEROUS
        assert result.stderr.count("Error: ") == 2
        assert f"{folder / 'broken'}: cannot be read" in result.stderr
        result = run("screen", folder / "a.txt", *bad)
        assert result.exit_code == ERROR
        assert "CLEAR" in result.stdout

    def test_a_name_of_two_lines_is_shown_in_one(self, run, folder):
        (folder / "a\nCLEAR      score 0.00").write_text(ATTACK)
        lines = [line for line in run("screen", folder).stdout.splitlines() if line[0] != " "]
        assert [line.split()[0] for line in lines].count("CLEAR") == 2

    def test_a_named_folder_may_be_a_link(self, run, folder, tmp_path):
        (tmp_path / "link").symlink_to(folder)
        assert run("screen", tmp_path / "link").exit_code == DANGEROUS


class TestErrors:
    def test_bytes_that_are_not_utf8(self, run, tmp_path):
        path = tmp_path / "latin1.txt"
        path.write_bytes("Gr\u00fc\u00dfe".encode("latin-1"))
        result = run("screen", path)
        assert result.exit_code == ERROR
        assert f"{path}: not UTF-8 text (byte 2)" in result.output
        assert run("screen", input=b"abc\xff").exit_code == ERROR

    @pytest.mark.parametrize(
        "path", ["mail.txt", "folder/", "./mail", "/no/where", "a\\b", ".env", "x.tar.gz", "a.7z"]
    )
    def test_a_path_that_is_not_there_is_not_screened_as_text(
        self, run, tmp_path, monkeypatch, path
    ):
        monkeypatch.chdir(tmp_path)
        result = run("screen", BENIGN[0], path)
        assert result.exit_code == USAGE
        assert "argument 2" in result.output
        assert "--text" in result.output
        assert "CLEAR" not in result.output

    def test_text_without_a_text(self, run):
        assert run("screen", "--text", input=BENIGN[0]).exit_code == USAGE

    def test_a_folder_without_files(self, run, tmp_path):
        (tmp_path / "empty").mkdir()
        result = run("screen", tmp_path / "empty")
        assert result.exit_code == ERROR
        assert "nothing was screened" in result.output

    @pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
    def test_a_file_that_may_not_be_read(self, run, tmp_path):
        (tmp_path / "secret").write_text("text")
        (tmp_path / "secret").chmod(0)
        assert run("screen", tmp_path / "secret").exit_code == ERROR

    def test_a_missing_detector_says_what_to_run(self, run, monkeypatch, tmp_path):
        monkeypatch.setenv("ALKNET_HOME", str(tmp_path))
        result = run("screen", "--detector", "theirs", "text")
        assert result.exit_code == ERROR
        assert "alknet-firewall setup" in result.output

    def test_a_wrong_setting(self, run, monkeypatch):
        monkeypatch.setenv("ALKNET_THREADS", "many")
        result = run("screen", "text")
        assert result.exit_code == ERROR
        assert "ALKNET_THREADS" in result.output

    @pytest.mark.parametrize(
        "arguments",
        [("scren",), ("screen", "--origin", "tool", "a"), ("screen", "--jsn", "a"), ("evaluate",)],
    )
    def test_wrong_usage(self, run, arguments):
        assert run(*arguments).exit_code == USAGE

    @pytest.mark.parametrize(
        "arguments",
        [
            ("--text", "--help", ATTACK),
            ("--text", "-hh", ATTACK),
            (ATTACK, "-h"),
            ("--text", "--zyxcanaryzyx"),
            ("--text", "-zyxcanaryzyx"),
            ("--text=zyxcanaryzyx", "a"),
            ("--origin=zyxcanaryzyx", "a"),
        ],
    )
    def test_wrong_usage_neither_helps_nor_quotes(self, run, arguments):
        result = run("screen", *arguments)
        assert result.exit_code == USAGE
        assert "canary" not in result.output

    def test_text_like_an_option_says_what_to_do(self, run):
        output = run("screen", "--text", "--Ignore all").output
        assert "put -- before the texts" in output
        assert "screen --help' for help" in output

    @pytest.mark.parametrize(
        "arguments",
        [
            ("calibrate", "--out"),
            ("bundle", "--out"),
            ("evaluate", ".", "--quick", "--json"),
            ("evaluate", ".", "--quick", "--report"),
        ],
    )
    def test_an_output_without_a_folder(self, run, tmp_path, arguments):
        result = run(*arguments, tmp_path / "none" / "out")
        assert result.exit_code == USAGE
        assert f"there is no folder {tmp_path / 'none'}" in result.output

    def test_errors_do_not_quote_the_text(self, run):
        result = run("screen", "zyxcanaryzyx\ud800")
        assert result.exit_code == ERROR
        assert "canary" not in result.output


class TestAbout:
    def test_version_and_help(self, run):
        assert run("--version").output == f"alknet-firewall, version {__version__}\n"
        result = run("-h")
        assert result.exit_code == 0
        for command in ("screen", "setup", "download", "calibrate", "evaluate", "doctor"):
            assert command in result.output

    @pytest.mark.parametrize("command", sorted(main.commands))
    def test_every_command_explains_itself(self, run, command):
        result = run(command, "--help")
        assert result.exit_code == 0
        assert main.commands[command].help

    def test_inspect(self, run, tiny_folder):
        result = run("inspect")
        assert result.exit_code == 0, result.output
        assert f"tiny in {tiny_folder}" in result.output
        for what in (*FILES, "codebook window: 8", "codebook n_components: 2"):
            assert what in result.output

    def test_doctor(self, run, tiny_folder):
        result = run("doctor")
        assert result.exit_code == 0, result.output
        for what in ("instruction sets", "threads", f"detector: {tiny_folder}", "engine: native"):
            assert what in result.output
        assert "the fastest that this CPU has" in result.output
        assert "4 files, all as in the manifest" in result.output

    def test_doctor_names_the_configured_instruction_set(self, run, monkeypatch):
        monkeypatch.setenv("ALKNET_ISA", "scalar")
        output = run("doctor").output
        assert "instruction set: scalar (as configured; the fastest that this CPU has is" in output
        assert "engine: native (scalar," in output


class TestFiles:
    def test_verify(self, run, tiny_copy):
        assert run("verify", tiny_copy).exit_code == 0
        config = tiny_copy / "config.json"
        config.write_bytes(config.read_bytes() + b" ")
        result = run("verify", tiny_copy)
        assert result.exit_code == ERROR
        assert "changed: config.json" in result.output

    def test_a_bundle_is_verified_set_up_and_screened_with(self, run, tmp_path, monkeypatch):
        archive = tmp_path / "tiny.tar"
        result = run("bundle", "--out", archive)
        assert result.exit_code == 0, result.output
        assert run("verify", archive).exit_code == 0
        monkeypatch.setenv("ALKNET_HOME", str(tmp_path / "home"))
        result = run("setup", "--source", archive)
        assert result.exit_code == 0, result.output
        monkeypatch.setenv("ALKNET_DETECTOR", "tiny")
        assert run("screen", ATTACK).exit_code == DANGEROUS

    def test_a_damaged_bundle(self, run, tmp_path):
        archive = tmp_path / "tiny.tar"
        assert run("bundle", "--out", archive).exit_code == 0
        data = bytearray(archive.read_bytes())
        data[len(data) // 2] ^= 1
        archive.write_bytes(data)
        assert run("verify", archive).exit_code == ERROR

    def test_calibrate_without_text(self, run, tmp_path):
        result = run("calibrate", "--null-only", "--out", tmp_path / "out.safetensors")
        assert result.exit_code == ERROR
        assert not (tmp_path / "out.safetensors").exists()

    def test_nothing_of_a_detector_is_changed_by_reading_it(self, run, tiny_folder):
        before = {n: (tiny_folder / n).read_bytes() for n in (*FILES, MANIFEST, CODEBOOK)}
        for command in (("screen", ATTACK), ("inspect",), ("doctor",), ("verify",)):
            run(*command)
        assert before == {n: (tiny_folder / n).read_bytes() for n in before}
        assert {path.name for path in tiny_folder.iterdir()} == set(before)


def process(*arguments: str, tiny_folder, **options):
    """The installed program as a shell would run it."""
    return command(
        sys.executable, "-m", "alknet_firewall", *arguments, tiny_folder=tiny_folder, **options
    )


def command(*words: str, tiny_folder, **options):
    environment = {**os.environ, "ALKNET_DETECTOR": str(tiny_folder)}
    return subprocess.run(
        words, capture_output=True, timeout=60, check=False, env=environment, **options
    )


def test_as_a_process(tiny_folder):
    done = process("screen", "--json", ATTACK, tiny_folder=tiny_folder)
    assert done.returncode == DANGEROUS, done.stderr
    assert json.loads(done.stdout)["level"] == "DANGEROUS"
    assert done.stderr == b""


def test_as_a_process_with_standard_input(tiny_folder):
    done = process("screen", tiny_folder=tiny_folder, input=f"{BENIGN[6]} {ATTACK}".encode())
    assert done.returncode == DANGEROUS
    assert b"\x1b[" not in done.stdout


def test_as_a_process_with_an_argument_that_is_not_utf8(tiny_folder):
    done = process("screen", os.fsdecode(b"zyxcanaryzyx\xff\xfe"), tiny_folder=tiny_folder)
    assert done.returncode == ERROR
    assert b"surrogates" in done.stderr
    assert b"Traceback" not in done.stderr
    assert b"canary" not in done.stderr


def test_as_a_process_with_a_name_that_the_terminal_cannot_show(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    (tmp_path / "\u4f60.txt").write_text(ATTACK)
    done = process("screen", str(tmp_path), tiny_folder=tiny_folder)
    assert done.returncode == DANGEROUS, done.stderr
    assert b"\\u4f60.txt" in done.stdout


def test_as_a_process_without_standard_input(tiny_folder):
    line = 'exec "$0" -m alknet_firewall screen <&-'
    done = command("sh", "-c", line, sys.executable, tiny_folder=tiny_folder)
    assert done.returncode == ERROR
    assert b"Error: -: is closed" in done.stderr
