"""Draw what `step.py` measured: a bar for each way to train, a panel for each setting.

python benchmarks/plot_step.py benchmarks/results/step-cpu.json --output docs
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bitfit_fast.files import replace_file

__all__ = ["draw"]

MODELS = {"minilm": "MiniLM", "bert-base": "BERT-base"}
COLOURS = {"reference": "0.55", "other": "0.8", "ladder": "C0", "fast": "C9"}
GROUPS = {
    "reference": "BitFit in plain PyTorch",
    "other": "other methods",
    "ladder": "bitfit_fast, part by part",
    "fast": "bitfit_fast, other modes",
}
#: What the factors beside the bars are against, in this order of preference.
BASES = ("fp32", "autocast", "fp32-128")
_TIMES = "\N{MULTIPLICATION SIGN}"
_SETTING = ("model", "task", "batch_size", "dropout")


def _panels(results: dict[str, Any]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    panels: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        if "ms" in row:
            panels.setdefault(tuple(row[n] for n in _SETTING), []).append(row)
    return panels


def _in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows by group, within one in the order in which they were named."""
    groups = list(COLOURS)
    return sorted(rows, key=lambda row: groups.index(row["group"]))


def draw(results: dict[str, Any], path: Path, columns: int = 2) -> None:
    """Draw all settings.

    Parameters
    ----------
    results : dict
        As in the file of a run.
    path : Path
        PNG or SVG file to write.
    columns : int
        Panels side by side.
    """
    panels = _panels(results)
    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)
    most = max(map(len, panels.values()))
    size = 3.2 + 4.3 * columns, 1.1 + lines * (0.9 + 0.23 * most)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=False)
    for axis in grid.flat[len(panels) :]:
        axis.set_axis_off()
    for number, (axis, (setting, rows)) in enumerate(zip(grid.flat, panels.items())):
        _panel(axis, setting, _in_order(rows), results, number % columns == 0)
    used = {row["group"] for rows in panels.values() for row in rows}
    figure.legend(
        handles=[Patch(color=COLOURS[g], label=GROUPS[g]) for g in COLOURS if g in used],
        loc="outside lower center",
        ncols=len(used) if columns > 1 else 2,
        frameon=False,
        fontsize=9,
    )
    versions = results["versions"]
    figure.suptitle(
        f"A training step on {results['device']}, torch {versions['torch']}: medians, p20 to p80",
        fontsize=10,
    )
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=130))


def _panel(
    axis: Any,
    setting: tuple[Any, ...],
    rows: list[dict[str, Any]],
    results: dict[str, Any],
    labels: bool,
) -> None:
    model, task, batch_size, dropout = setting
    places = range(len(rows), 0, -1)
    times = [row["ms"]["p50"] for row in rows]
    axis.barh(places, times, color=[COLOURS[row["group"]] for row in rows], height=0.78)
    axis.hlines(
        places,
        [row["ms"]["p20"] for row in rows],
        [row["ms"]["p80"] for row in rows],
        color="black",
        linewidth=1,
    )
    base = next((b for b in BASES if any(r["variant"] == b for r in rows)), None)
    for place, row in zip(places, rows):
        middle = row["ms"]["p50"]
        text = f"{middle:,.0f} ms" if middle >= 100 else f"{middle:.3g} ms"
        if base in row["speedup"] and row["variant"] != base:
            text += f"   {row['speedup'][base]:.2f}{_TIMES}"
        end = row["ms"]["p80"]
        axis.annotate(
            text, (end, place), (4, 0), textcoords="offset points", va="center", fontsize=7.5
        )
    axis.set_xlim(0, 1.35 * max(row["ms"]["p80"] for row in rows))
    axis.set_ylim(0.4, len(rows) + 0.6)
    names = [results["variants"].get(row["variant"], row["variant"]) for row in rows]
    axis.set_yticks(list(places), names if labels else [""] * len(rows), fontsize=8)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    length = f"{task} tokens each" if task.isdigit() else f"{task}'s lengths"
    axis.set_title(
        f"{MODELS.get(model, model)}, {length}, batch {batch_size}, dropout {dropout:g}",
        fontsize=9,
        loc="left",
    )
    against = "" if base is None else f";  {_TIMES}: against {results['variants'].get(base, base)}"
    axis.set_xlabel(f"ms a step{against}", fontsize=8)


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="JSON file of step.py")
    parser.add_argument("--output", type=Path, help="folder of the picture; that of the results")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text(encoding="utf-8"))
    path = (arguments.output or arguments.results.parent) / f"{arguments.results.stem}.png"
    if not _panels(results):
        print("nothing was timed")
        return
    draw(results, path)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
