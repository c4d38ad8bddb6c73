"""The calibration text written for this project: complete, consistent, reproducible."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest
from alknet_firewall.authored import Row, calibration_rows, generate, generator
from alknet_firewall.authored.__main__ import main
from alknet_firewall.authored.dice import Dice
from alknet_firewall.authored.disguise import CIPHERS
from alknet_firewall.authored.documents import CARRIERS, Document
from alknet_firewall.authored.grammar import GrammarError, bind, load
from alknet_firewall.authored.groups import GROUPS, Group
from alknet_firewall.authored.phrases import LANGUAGES, phrases
from alknet_firewall.authored.rows import Draft
from alknet_firewall.authored.shipped import shipped_lines

DATA = Path(__file__).parent / "data"

# A slot that was not filled, or a place in a document that was not closed.
UNFILLED = re.compile(
    r"\{\^?[a-z_.]+(#\d+)?\}|\{\d+\.\.\d+"
    r"|\{[^{}\"\n]*\|[^{}\"\n]*\}|[\ue000-\uf8ff]"
)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return list(generate(seed=1, rows=12_000))


def test_equal_seeds_give_equal_rows() -> None:
    assert list(generate(5, 600)) == list(generate(5, 600))


def test_another_seed_gives_other_texts() -> None:
    first, second = ({row["text"] for row in generate(seed, 2_000)} for seed in (1, 2))
    assert len(first & second) < 0.3 * len(first)


def test_shipped_part_is_what_the_generator_writes() -> None:
    shipped = [json.dumps(row, ensure_ascii=False) + "\n" for row in calibration_rows()]
    assert shipped == list(shipped_lines()), "run: python -m alknet_firewall.authored --shipped"


def test_shipped_part_holds_every_group_and_language() -> None:
    rows = list(calibration_rows())
    assert 1_500 <= len(rows) <= 2_600
    assert {row["source"] for row in rows} == {f"authored/{group.name}" for group in GROUPS}
    assert {row["lang"] for row in rows} == {"en", *LANGUAGES}


def test_about_as_many_rows_as_asked_for(rows: list[Row]) -> None:
    assert 10_500 < len(rows) <= 12_050


def test_every_family_carrier_and_language_occurs(rows: list[Row]) -> None:
    families = {row["family"] for row in rows if row["label"] == 1}
    assert len(families) >= 30
    assert set(CIPHERS) <= families
    assert {row["carrier"] for row in rows if row["label"] == 1} >= set(CARRIERS)
    assert {row["carrier"] for row in rows if row["label"] == 0} >= set(CARRIERS)
    for label in (0, 1):
        assert {row["lang"] for row in rows if row["label"] == label} == {"en", *LANGUAGES}


def test_attacks_and_harmless_texts_are_balanced_for_each_origin(rows: list[Row]) -> None:
    for origin in ("user", "document"):
        labels = [row["label"] for row in rows if row["origin"] == origin]
        assert 0.3 < sum(labels) / len(labels) < 0.7


def test_labels_follow_the_kind(rows: list[Row]) -> None:
    for row in rows:
        assert row["label"] == (row["kind"] not in ("benign", "hard_benign"))
        if row["origin"] == "document" and row["label"]:
            assert row["kind"] == "indirect_injection"


def test_pairs_are_one_document_with_and_without_its_injection(rows: list[Row]) -> None:
    pairs = defaultdict(list)
    for row in rows:
        if row["pair"]:
            pairs[row["pair"]].append(row)
    assert pairs
    for clean, injected in pairs.values():
        assert (clean["label"], injected["label"]) == (0, 1)
        assert clean["origin"] == injected["origin"]
        assert clean["source"] == injected["source"]
        # The injection adds to the document and takes nothing away.
        characters = iter(injected["text"])
        assert all(character in characters for character in clean["text"])


def test_texts_are_whole(rows: list[Row]) -> None:
    for row in rows:
        assert row["text"].strip()
        verbatim_code = row["family"] == "code" and not row["carrier"]
        assert verbatim_code or not UNFILLED.search(row["text"]), row["text"]


def test_no_group_repeats_a_text(rows: list[Row]) -> None:
    texts = [(row["source"], row["text"]) for row in rows]
    assert len(set(texts)) == len(texts)
    assert len({row["id"] for row in rows}) == len(rows)


def test_no_text_is_both_attack_and_harmless_for_the_same_origin(rows: list[Row]) -> None:
    attacks, harmless = (
        {(row["origin"], row["text"]) for row in rows if row["label"] == label} for label in (1, 0)
    )
    assert not attacks & harmless


def test_lengths_reach_from_a_word_to_many_pages(rows: list[Row]) -> None:
    lengths = sorted(len(row["text"].split()) for row in rows if row["origin"] == "document")
    assert lengths[0] < 10
    assert lengths[-1] > 900


def test_only_the_groups_asked_for_are_written() -> None:
    sources = {row["source"] for row in generate(0, 100, ["overrides", "prose"])}
    assert sources == {"authored/overrides", "authored/prose"}


def test_an_unknown_group_is_named() -> None:
    with pytest.raises(ValueError, match="no such group: overides; known are"):
        list(generate(0, 10, ["overides"]))


def test_a_group_ends_when_it_has_nothing_new(monkeypatch: pytest.MonkeyPatch) -> None:
    lone = Group("lone", 1.0, lambda _grammar, _dice: [Draft("ok", "benign", "chat", "user")])
    monkeypatch.setattr(generator, "GROUPS", (lone,))
    assert [row["text"] for row in generate(0, 10)] == ["ok"]


def test_command_line_writes_one_file_per_group(tmp_path: Path) -> None:
    main(["--out", str(tmp_path), "--rows", "60", "--parts", "prose", "overrides"])
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["authored-overrides.jsonl", "authored-prose.jsonl"]
    texts = [path.read_text(encoding="utf-8") for path in tmp_path.iterdir()]
    assert sum(text.count("\n") for text in texts) == 60


@pytest.mark.parametrize("name", ["trigger_words", "multilingual_benign"])
def test_held_out_texts_are_not_in_the_calibration_text(name: str, rows: list[Row]) -> None:
    calibration = {_eight_words(row["text"]) for row in rows}
    lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    held_out = [json.loads(line)["text"] for line in lines]
    assert len(set(held_out)) == len(held_out) >= 300
    joined = "\n".join(row["text"].lower() for row in rows)
    assert not [text for text in held_out if len(text.split()) > 4 and text.lower() in joined]
    assert calibration.isdisjoint(map(_eight_words, held_out))


def _eight_words(text: str) -> str:
    return " ".join(text.lower().split()[:8])


def test_a_document_closes_every_place() -> None:
    document = Document(CARRIERS["prose"], "\ue000\nOne.\ue000 Two.\n\ue000\nThree.")
    assert document.fill({}) == "One. Two.\nThree."


def test_insertions_keep_their_order() -> None:
    document = Document(CARRIERS["csv"], "a\ue000,b\ue000,c\ue000")
    text = document.fill(document.place(["first", "second"], phrases(), Dice("x")))
    assert text.index("first") < text.index("second")


def test_insertions_are_escaped_in_quoted_carriers() -> None:
    document = Document(CARRIERS["json"], '{"text": "Hello.\ue000"}')
    text = document.fill(document.place(['Say "no"\nnow'], phrases(), Dice("x")))
    assert json.loads(text) == {"text": 'Hello. Say "no"\nnow'}


def test_grammar_fills_slots_and_leaves_other_braces(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(
        '== a blocks ==\n{^b#1} {b#1} {3..3} {x|x} {"k": {"b": 1}} {2..2*c}\n'
        "== b ==\n# a remark\nword\n== c ==\none\ntwo\n== r raw ==\n{b}\n",
        encoding="utf-8",
    )
    grammar = load(tmp_path)
    text = grammar.draw("a", Dice("s"))
    assert text.startswith('Word word 3 x {"k": {"b": 1}} ')
    assert sorted(text.rsplit("} ", 1)[1].split("\n")) == ["one", "two"]
    assert grammar.draw("r", Dice("s")) == "{b}"
    assert grammar.draw("b", Dice("s"), bind(b="bound")) == "bound"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("== a ==\n{missing}\n", "section 'a' refers to 'missing'"),
        ("== a ==\n\n== b ==\nx\n", "section 'a' is empty"),
        ("stray\n== a ==\nx\n", "text without a section"),
        ("== a ==\nx\n== a ==\ny\n", "section 'a' is defined twice"),
    ],
)
def test_grammar_names_the_mistake(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    with pytest.raises(GrammarError, match=message):
        load(tmp_path)


def test_every_phrase_section_is_used() -> None:
    """A section nobody draws from is a mistake in its name."""
    folder = Path(__file__).parents[1] / "python/alknet_firewall/authored"
    sources = [*folder.glob("*.py"), *folder.rglob("*.txt")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    composed = (
        "topic.",
        "title.",
        "carrier.",
        "long.",
        "wrap.",
        *(f"{lang}." for lang in LANGUAGES),
    )
    for name in phrases().names():
        used = re.search(rf'[{{^*"|]{re.escape(name)}["}}#]', text)
        assert used or name.startswith(composed), name


def test_every_topic_is_listed() -> None:
    index = DATA.parents[1] / "python/alknet_firewall/authored/data/topics/index.txt"
    listed = set(re.findall(r"\{(topic\.\w+|title\.\w+)\}", index.read_text(encoding="utf-8")))
    assert listed == {*phrases().names("topic."), *phrases().names("title.")}
