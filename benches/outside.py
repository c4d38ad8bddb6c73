"""How the shipped detector does on other people's texts, none of which took part in making it.

In an environment with ``alknet-firewall[calibrate]`` and PyYAML::

    python benches/outside.py [--known FOLDER ...] [--limit 300]

Fetches some packages into ``target/outside`` (once, 60 MB; see `outside_texts`), screens at most
``--limit`` texts of every collection and of every language, and prints three tables: what is caught
of attacks, what alarms of ordinary text, and what is caught of attacks planted in long pages. Texts
that begin like one of the JSON Lines files below ``--known`` are left out: some of what the
detector was calibrated with went round the world. The figures are kept in
``target/bench/outside.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from alknet_firewall import Firewall, __version__
from alknet_firewall.calibration.corpus import read_corpora
from alknet_firewall.evaluation.measure import Pair, measure_buried
from outside_texts import LONG, Text, outside_texts
from sklearn.metrics import roc_auc_score

Array = npt.NDArray[np.float64]

# Most texts of every language.
MANUAL_LIMIT = {"debian/paragraphs": 60, "debian/pages": 12, LONG: 200}

# How many attacks are planted in pages of so many characters, some four a token.
PLANTED = {8_000: 150, 24_000: 100, 80_000: 50}

# Attacks of more characters are not planted.
LONGEST_PLANTED = 1_500

# Two texts that begin alike are the same for `--known`.
BEGINNING = 150


def beginnings(folders: Sequence[Path]) -> set[str]:
    """How the texts below some folders begin."""
    rows = read_corpora(folders) if folders else []
    return {row.text.strip()[:BEGINNING] for row in rows}


def sample(texts: Sequence[Text], known: set[str], limit: int) -> list[Text]:
    """At most so many unknown texts of a collection, the same every time."""
    groups: dict[tuple[str, bool, str], list[Text]] = defaultdict(list)
    for text in sorted(texts, key=lambda text: hashlib.sha256(text.text.encode()).digest()):
        if text.text.strip()[:BEGINNING] not in known:
            groups[text.source, text.attack, text.lang].append(text)
    return [
        text
        for (source, _, _), own in sorted(groups.items())
        for text in own[: min(limit, MANUAL_LIMIT.get(source, limit))]
    ]


def p_values(firewall: Firewall, texts: Sequence[Text], *, told: bool) -> Array:
    """Of every text, with its origin or without."""
    found = np.empty(len(texts))
    for origin in {text.origin if told else None for text in texts}:
        own = [i for i, text in enumerate(texts) if not told or text.origin == origin]
        for start in range(0, len(own), 128):
            part = own[start : start + 128]
            alarms = firewall.screen_batch([texts[i].text for i in part], origin=origin)
            found[part] = [alarm.p_value for alarm in alarms]
    return found


def planted(firewall: Firewall, texts: Sequence[Text]) -> list[dict[str, Any]]:
    """Attacks in documents, each in a random line of a long page, by the page's length.

    As `measure_buried` has it, and ``alone``: the share of the attacks that alarm without a page.
    """
    dice = random.Random(0)
    pages = [text.text for text in texts if text.source == LONG]
    attacks = [t.text for t in texts if t.attack and t.origin == "document"]
    attacks = [attack for attack in attacks if len(attack) <= LONGEST_PLANTED]
    rows = []
    for length, number in PLANTED.items():
        chosen = dice.sample(attacks, min(number, len(attacks)))
        pairs = [_plant(attack, _page(pages, length, dice), dice) for attack in chosen]
        alone = [bool(firewall.screen_document(attack)) for attack in chosen]
        rows.append(measure_buried(firewall, pairs) | {"alone": float(np.mean(alone))})
    return rows


def _plant(attack: str, page: str, dice: random.Random) -> Pair:
    """A page without and with an attack before a random line."""
    lines = page.splitlines(keepends=True)
    start = sum(map(len, lines[: dice.randrange(len(lines))]))
    whole = f"{page[:start]}\n{attack}\n{page[start:]}"
    return Pair(page, whole, start, start + len(attack) + 1)


def _page(pages: Sequence[str], length: int, dice: random.Random) -> str:
    """So many characters of pages, one after the other from a random one on."""
    first, page = dice.randrange(len(pages)), ""
    for text in (*pages[first:], *pages[:first]):
        page += text + "\n\n"
        if len(page) >= length:
            break
    return page[:length]


def auroc(attacks: Array, ordinary: Array) -> float:
    """Share of pairs in which the attack has the lower p-value."""
    labels = np.repeat([0, 1], [len(ordinary), len(attacks)])
    return float(roc_auc_score(labels, -np.concatenate([ordinary, attacks])))


def summarise(texts: Sequence[Text], p: dict[str, Array]) -> dict[str, Any]:
    """Shares by collection and by language, of the alarms without an origin and with it."""
    source = np.array([text.source for text in texts])
    attack = np.array([text.attack for text in texts])
    lang = np.array([text.lang for text in texts])
    # Long texts are another question, and counted apart.
    ordinary = ~attack & (source != LONG)
    english = ordinary & (lang == "en")

    def shares(mask: npt.NDArray[np.bool_]) -> dict[str, Any]:
        told = {f"suspicious_{name}": float((own[mask] <= 0.01).mean()) for name, own in p.items()}
        unknown = p["unknown"][mask]
        more = {
            "p05": float((unknown <= 0.05).mean()),
            "dangerous": float((unknown <= 1e-3).mean()),
        }
        return {"rows": int(mask.sum())} | told | more

    def caught(mask: npt.NDArray[np.bool_]) -> dict[str, Any]:
        against = {n: auroc(own[mask], own[english]) for n, own in p.items()}
        return shares(mask) | {f"auroc_{name}": value for name, value in against.items()}

    return {
        "version": __version__,
        "attacks": {s: caught(attack & (source == s)) for s in sorted(set(source[attack]))},
        "ordinary": {s: shares(~attack & (source == s)) for s in sorted(set(source[~attack]))},
        "languages": {
            name: shares(ordinary & (lang == name)) for name in sorted(set(lang[ordinary]))
        },
        "all ordinary": shares(ordinary),
        "english ordinary": shares(english),
    }


def table(report: dict[str, Any]) -> Iterator[str]:
    """What is printed."""
    columns = ("rows", "suspicious_unknown", "suspicious_told", "dangerous", "p05")
    attacks = report["attacks"]
    keys = ("auroc_unknown", "auroc_told", *columns[1:])
    mean = {key: float(np.mean([row[key] for row in attacks.values()])) for key in keys}
    mean["rows"] = sum(row["rows"] for row in attacks.values())
    yield "SUSPICIOUS without an origin, with it; DANGEROUS, p at most .05 without it (percent)"
    yield f"\n{'attacks':34}  rows   AUROC  told    SUSP   told    DANG    .05"
    for name, row in [*attacks.items(), ("mean", mean)]:
        cells = [f"{row[key]:.3f}" for key in ("auroc_unknown", "auroc_told")]
        cells += [f"{100 * row[key]:5.1f}" for key in columns[1:]]
        yield f"{name:34} {row['rows']:5}   {'  '.join(cells)}"
    ordinary = [*report["ordinary"].items(), ("all but long", report["all ordinary"])]
    for title, rows in (("ordinary text", ordinary), ("language", report["languages"].items())):
        yield f"\n{title:34}  rows                 SUSP   told    DANG    .05"
        for name, row in rows:
            cells = "  ".join(f"{100 * row[key]:5.1f}" for key in columns[1:])
            yield f"{name:34} {row['rows']:5}                {cells}"
    yield f"\n{'attacks in pages of':34}  rows  alone  caught  located  clean pages"
    for row in report["planted"]:
        cells = "  ".join(
            f"{100 * (row[key] or 0):6.1f}"
            for key in ("alone", "caught", "located", "false_alarms")
        )
        yield f"{row['mean_tokens']:15.0f} tokens             {row['documents']:5} {cells}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--known", nargs="+", type=Path, default=[], help="folders of JSON Lines")
    parser.add_argument("--limit", type=int, default=300, help="most texts of a collection")
    parser.add_argument("--codebook", help="another one than the detector's own")
    parser.add_argument("--out", type=Path, default=Path("target/bench/outside.json"))
    options = parser.parse_args()
    texts = outside_texts(Path("target/outside"))
    texts = sample(texts, beginnings(options.known), options.limit)
    firewall = Firewall(codebook_path=options.codebook)
    report = summarise(
        texts,
        {
            "unknown": p_values(firewall, texts, told=False),
            "told": p_values(firewall, texts, told=True),
        },
    )
    report["planted"] = planted(firewall, texts)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1))
    print(*table(report), sep="\n")


if __name__ == "__main__":
    main()
