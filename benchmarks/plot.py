"""Draw and print what the kernel benchmarks measured.

    python benchmarks/plot.py benchmarks/results/kernels-cpu.json --output docs

One picture, named as the results: time relative to eager PyTorch, and the share that each
variant reaches of the limit by measured copy bandwidth and matrix product rate.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bitfit_fast.files import replace_file

__all__ = ["draw", "table"]

MODELS = {384: "MiniLM", 768: "BERT-base", 1024: "BERT-large, ViT-L"}
COLOURS = {"eager": "0.45", "ours": "C0", "compile": "C1", "epilogue": "C2", "liger": "C4"}
NAMES = {"compile": "torch.compile", "ours": "bitfit_fast", "epilogue": "bitfit_fast, epilogue"}
DIRECTIONS = ("forward", "backward", "both")

Key = tuple[str, str, int, int, str]


def _by_key(results: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    names = ("operation", "direction", "width", "tokens", "variant")
    return {tuple(r[n] for n in names): r for r in results["rows"] if "ms" in r}


def _sorted(values: Any) -> list[Any]:
    return sorted(set(values))


def _total(rows: dict[Key, dict[str, Any]], operation: str) -> str:
    """Return the direction that has all of an operation."""
    return next(d for d in reversed(DIRECTIONS) if any(k[:2] == (operation, d) for k in rows))


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw a grid of operations by directions.

    Parameters
    ----------
    results : dict
        As in the file of a run.
    path : Path
        PNG or SVG file to write.
    """
    rows = _by_key(results)
    # what has no forward pass comes last, so that the first column has every row
    operations = sorted(dict.fromkeys(k[0] for k in rows), key=lambda o: _total(rows, o) != "both")
    widths, tokens = (_sorted(key[i] for key in rows) for i in (2, 3))
    variants = [v for v in COLOURS if any(key[4] == v for key in rows)]
    figure = Figure(figsize=(1.5 + 1.9 * len(operations), 9), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(4, len(operations), sharex=True, sharey="row", squeeze=False)
    for column, operation in enumerate(operations):
        for line, (axis, direction) in enumerate(zip(grid[:, column], (*DIRECTIONS, None))):
            share = direction is None
            direction = direction or _total(rows, operation)
            at = [key for key in rows if key[:2] == (operation, direction)]
            if not at:
                axis.set_axis_off()
                continue
            for width, dashes in zip(widths, ("-", "--", ":")):
                for variant in variants:
                    points = [(t, rows.get((*at[0][:2], width, t, variant))) for t in tokens]
                    eager = [rows.get((*at[0][:2], width, t, "eager")) for t in tokens]
                    points = [(*p, e) for p, e in zip(points, eager) if p[1] and (e or share)]
                    style = {"color": COLOURS[variant], "linestyle": dashes, "linewidth": 1.3}
                    x = [t for t, _, _ in points]
                    if share:
                        y = [100 * row["share_of_limit"] for _, row, _ in points]
                        axis.plot(x, y, marker="o", markersize=3, **style)
                        continue
                    y, low, high = (
                        [row["ms"][p] / e["ms"]["p50"] for _, row, e in points]
                        for p in ("p50", "p20", "p80")
                    )
                    axis.plot(x, y, marker="o", markersize=3, **style)
                    axis.vlines(x, low, high, color=COLOURS[variant], alpha=0.35, linewidth=3)
            axis.set_xscale("log", base=2)
            # of one size alone there would be no limits to find
            axis.set_xlim(min(tokens) / 1.5, max(tokens) * 1.5)
            axis.set_xticks(tokens, [f"{t // 1024}k" if t >= 1024 else str(t) for t in tokens])
            axis.minorticks_off()
            if not share:
                axis.set_yscale("log", base=2)
                axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8, labelbottom=True, labelleft=True)
            if line == 3:
                axis.set_xlabel("tokens", fontsize=8)
        top = next(axis for axis in grid[:, column] if axis.axison)
        top.set_title(operation.replace("_layer", "\n_layer"), fontsize=9)
    for axis, name in zip(grid[:, 0], (*DIRECTIONS, None)):
        label = f"{name}\ntime / time of eager" if name else "% of the limit,\nall of the above"
        axis.set_ylabel(label, fontsize=9)
    _legend(figure, variants, widths)
    rate = results["product_tflop_s"]
    product = f"{rate:.3g} TFLOP/s" if rate >= 1 else f"{1e3 * rate:.3g} GFLOP/s"
    figure.suptitle(
        f"{results['device']}, {results['dtype']}, torch {results['versions']['torch']}: "
        f"medians, p20 to p80; limit from a copy at {results['copy_gb_s']:.4g} GB/s "
        f"and a product at {product}",
        fontsize=10,
    )
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=130))


def _legend(figure: Figure, variants: list[str], widths: list[int]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=COLOURS[v], label=NAMES.get(v, v)) for v in variants]
    handles += [
        Line2D([], [], color="black", linestyle=dashes, label=f"width {w} ({MODELS.get(w, '')})")
        for w, dashes in zip(widths, ("-", "--", ":"))
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        fontsize=9,
    )


def table(results: dict[str, Any]) -> str:
    """Return a line for each group: milliseconds, and each variant's time over eager's."""
    rows = _by_key(results)
    variants = [v for v in COLOURS if v != "eager" and any(key[4] == v for key in rows)]
    head = ("", "tokens", "width", "floor ms", "eager ms", *(f"{v} /eager" for v in variants))
    # what the host takes to launch, which small batches wait for
    hosts = ("eager", "ours") if any(r.get("host_ms") for r in rows.values()) else ()
    head += tuple(f"{v} host ms" for v in hosts)
    lines = [head]
    groups = dict.fromkeys(key[:4] for key in rows)
    for group in groups:
        operation, direction, width, tokens = group
        eager = rows.get((*group, "eager"))
        if direction != _total(rows, operation) or eager is None:
            continue
        found = [rows.get((*group, v)) for v in variants]
        ratios = [f"{r['ms']['p50'] / eager['ms']['p50']:.2f}" if r else "" for r in found]
        times = (f"{eager['floor_ms']:.3g}", f"{eager['ms']['p50']:.3g}")
        launched = (rows.get((*group, v)) for v in hosts)
        waits = [f"{r['host_ms']:.3g}" if r else "" for r in launched]
        lines.append((operation, str(tokens), str(width), *times, *ratios, *waits))
    sizes = [max(map(len, column)) for column in zip(*lines)]
    text = ["  ".join(cell.rjust(size) for cell, size in zip(line, sizes)) for line in lines]
    failed = [r for r in results["rows"] if "error" in r]
    for row in failed:
        names = ("operation", "direction", "tokens", "width", "variant", "error")
        text.append("failed: " + " ".join(str(row[name]) for name in names))
    if results["skipped"]:
        why = ", ".join(_sorted(left["why"] for left in results["skipped"]))
        text.append(f"{len(results['skipped'])} groups left out: {why}")
    if not results["finished"]:
        text.append("the run was stopped before its end")
    return "\n".join(text)


def main() -> None:
    """Draw the picture, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="kernels-DEVICE.json")
    parser.add_argument("--output", type=Path, help="folder of the picture; that of the results")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text(encoding="utf-8"))
    path = (arguments.output or arguments.results.parent) / f"{arguments.results.stem}.png"
    if _by_key(results):
        draw(results, path)
    print(table(results))
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
