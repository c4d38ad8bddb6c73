"""The bench's numbers as text and as a picture."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["plot", "table"]

_NATIVE = "alknet-firewall"
_LIMIT = "limit of this machine"


def table(result: dict[str, Any]) -> str:
    """Everything in ``peers.json``, to be read by people."""
    parts = [_heading(result), *_passes(result), *_missing(result), *_limit(result)]
    return "\n".join([*parts, *_product(result)])


def _heading(result: dict[str, Any]) -> str:
    keys = ("cpu", "threads", "compiler", "revision", "sites", "date")
    return "\n".join(f"{key:<10} {result[key]}" for key in keys)


def _cells(result: dict[str, Any], isa: str) -> dict[str, dict[int, dict[str, Any]]]:
    cells: dict[str, dict[int, dict[str, Any]]] = {}
    for entry in result["passes"]:
        if entry["isa"] == isa:
            cells.setdefault(entry["engine"], {})[entry["tokens"]] = entry
    return cells


def _lengths(result: dict[str, Any]) -> list[int]:
    return sorted({entry["tokens"] for entry in result["passes"]})


def _passes(result: dict[str, Any]) -> Iterator[str]:
    lengths = _lengths(result)
    for isa in dict.fromkeys(entry["isa"] for entry in result["passes"]):
        cells = _cells(result, isa)
        yield f"\none pass, {isa} instructions: median ms ± half the interquartile range"
        yield f"{'tokens':<24}" + "".join(f"{n:>18}" for n in lengths) + "   cosine"
        for engine, row in cells.items():
            numbers = (
                f"{row[n]['ms']:.2f} ± {row[n]['spread'] / 2:.2f}" if n in row else "-"
                for n in lengths
            )
            cosine = result["agreement"].get(isa, {}).get(engine)
            shown = "" if cosine is None else f"   {cosine:.4f}"
            yield f"{engine:<24}" + "".join(f"{number:>18}" for number in numbers) + shown
        yield from _ratios(cells, lengths)


def _ratios(cells: dict[str, dict[int, dict[str, Any]]], lengths: list[int]) -> Iterator[str]:
    ours = cells.get(_NATIVE, {})
    ratios = []
    for n in lengths:
        peers = [row[n]["ms"] for engine, row in cells.items() if engine != _NATIVE and n in row]
        ratios.append(f"{ours[n]['ms'] / min(peers):.2f}" if n in ours and peers else "-")
    yield f"{'ours / best peer':<24}" + "".join(f"{ratio:>18}" for ratio in ratios)


def _missing(result: dict[str, Any]) -> Iterator[str]:
    if result["missing"]:
        yield "\nmissing"
    for entry in result["missing"]:
        reason = " ".join(entry["reason"].split())
        yield f"  {entry['engine']} ({entry['isa']}): {reason[:160]}"


def _limit(result: dict[str, Any]) -> Iterator[str]:
    limit = result["limit"]
    if "missing" in limit:
        yield f"\nmachine's limit missing: {limit['missing']}"
        return
    rates = {name: rate / 1e9 for name, rate in limit["rates"].items() if name != "threads"}
    yield "\nthis machine, 10⁹ per second, all threads: bytes streamed and multiply-adds"
    yield "  " + "   ".join(f"{name.split('_per_s')[0]} {rate:.1f}" for name, rate in rates.items())
    for isa, shares in limit["share"].items():
        least = limit["least_ms"][isa]
        yield f"least ms of our pass, and our share of the limit ({isa})"
        yield "  " + "   ".join(
            f"{n} tokens: {least[n]:.2f} ms, {share:.0%}" for n, share in shares.items()
        )


def _product(result: dict[str, Any]) -> Iterator[str]:
    if "product_missing" in result:
        yield f"\nmeasures of the whole product missing: {result['product_missing']}"
        return
    short = result["screen_30_words"]
    yield f"\nimport over bare Python      {result['import_ms']:.0f} ms"
    yield f"import to first alarm        {result['cold_start_ms']:.0f} ms"
    yield f"whole process of one alarm   {result['cold_start_process_ms']:.0f} ms"
    yield (
        f"memory after 1,000 screens   {result['rss_mb']:.0f} MB "
        f"({result['rss_anonymous_mb']:.0f} its own, {result['rss_mapped_files_mb']:.0f} mapped "
        f"files; peak {result['rss_peak_mb']:.0f})"
    )
    for name, tokens in (("throughput", 128), ("throughput_short", 16)):
        rates = result[f"{name}_texts_per_s"]
        yield (
            f"{result['throughput_callers']} callers over one          {result[name]:.2f} "
            f"({rates['together']:.0f} and {rates['alone']:.0f} texts of {tokens} tokens a second)"
        )
    yield (
        f"screen() of 30 words         {short['screen']:.2f} ms, "
        f"{short['ratio']:.2f} of its forward pass"
    )
    yield "\nwhere a screening's time goes, ms"
    columns = ("tokenize", "forward", "other", "screen", "early_exit")
    yield f"{'tokens':<10}" + "".join(f"{name:>15}" for name in columns)
    for n, stages in result["stages_ms"].items():
        yield f"{n:<10}" + "".join(f"{stages[name]:>15.3f}" for name in columns)


def plot(result: dict[str, Any], path: Path) -> None:
    """Time of one pass over its length with quartiles, one panel for each instruction set."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    isas = list(dict.fromkeys(entry["isa"] for entry in result["passes"]))
    engines = dict.fromkeys(entry["engine"] for entry in result["passes"])
    styles = _styles(list(engines))
    size = (5.2 * len(isas) + 2.4, 5.2)
    figure, axes = pyplot.subplots(
        1, len(isas), figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    for panel, isa in zip(axes[0], isas, strict=True):
        _draw(panel, result, isa, styles)
    axes[0][0].set_ylabel("milliseconds")
    lines = {line.get_label(): line for panel in axes[0] for line in panel.get_lines()}
    names = [name for name in (*engines, _LIMIT) if name in lines]
    figure.legend([lines[name] for name in names], names, loc="outside right center")
    figure.suptitle(f"One pass of the detector's model on {result['threads']} × {result['cpu']}")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _styles(engines: list[str]) -> dict[str, dict[str, Any]]:
    """Ours in thick black, the others each in a colour of its own."""
    import matplotlib

    colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    peers = [engine for engine in engines if engine != _NATIVE]
    styles: dict[str, dict[str, Any]] = {
        engine: {"color": colours[i % 20]} for i, engine in enumerate(peers)
    }
    return styles | {_NATIVE: {"color": "black", "linewidth": 2.5}}


def _draw(panel: Any, result: dict[str, Any], isa: str, styles: dict[str, dict[str, Any]]) -> None:
    lengths = _lengths(result)
    for engine, row in _cells(result, isa).items():
        entries = [row[n] for n in lengths if n in row]
        xs, ys = [e["tokens"] for e in entries], [e["ms"] for e in entries]
        panel.plot(xs, ys, marker="o", markersize=4, label=engine, **styles[engine])
        low, high = zip(*(e["quartiles"] for e in entries), strict=True)
        panel.vlines(xs, low, high, color=styles[engine]["color"])
    least = result["limit"].get("least_ms", {}).get(isa, {})
    if least:
        panel.plot([int(n) for n in least], list(least.values()), "k:", label=_LIMIT)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(lengths, [str(n) for n in lengths])
    panel.set_xlabel("tokens")
    panel.set_title(f"{isa} instructions")
    panel.grid(alpha=0.3)
