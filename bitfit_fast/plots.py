"""The pictures: learning curves, and how much each bias moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import BitFitError, listed
from .files import replace_file

__all__ = ["change_heatmap", "check_picture", "learning_curves"]

_OUTSIDE = "outside"
_PICTURES = (".png", ".svg")


def _figure(width: float, height: float, columns: int = 1) -> Any:
    # no display and no global state: the caller's pyplot is left alone
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def check_picture(path: Path) -> None:
    """Refuse a file name that does not end in a known kind of picture."""
    if path.suffix.lower() not in _PICTURES:
        raise BitFitError(f"{path} is no name for a picture; it must end in {listed(_PICTURES)}")


def _write(figure: Any, path: Path) -> None:
    check_picture(path)
    # the same numbers give the same file
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=150, metadata=metadata))


def learning_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], metric: str, path: Path, title: str = ""
) -> None:
    """Draw loss and main metric against the step.

    Parameters
    ----------
    runs : mapping of str to sequence of mapping
        Label -> lines of its `metrics.jsonl`. With one run, each split has its colour;
        with several, each run has one, and training is dashed.
    metric : str
        The metric's key in the lines.
    path : Path
        PNG or SVG file to write.
    title : str
        Above the picture.
    """
    figure, axes = _figure(10, 4, columns=2)
    single = len(runs) == 1
    colour = 0
    for label, rows in runs.items():
        splits = list(dict.fromkeys(row["split"] for row in rows))
        for split in splits:
            lines = [row for row in rows if row["split"] == split]
            steps = [row["step"] for row in lines]
            for axis, key in zip(axes, ("loss", metric)):
                axis.plot(
                    steps,
                    [row[key] for row in lines],
                    color=f"C{colour}",
                    linestyle="--" if split == "train" and not single else "-",
                    marker="o" if len(steps) < 25 else None,
                    markersize=3,
                    label=split if single else f"{label}, {split}",
                )
            colour += single
        colour += not single
    for axis, key in zip(axes, ("loss", metric)):
        axis.set(xlabel="optimiser step", ylabel=key)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    _write(figure, path)


def change_heatmap(
    changes: Mapping[tuple[str, int | None], float], path: Path, title: str = ""
) -> None:
    """Draw the mean absolute change of each bias term by layer, as the BitFit paper does.

    Parameters
    ----------
    changes : mapping of (term, layer) to float
        Layer None stands for biases outside of the layers.
    path : Path
        PNG or SVG file to write.
    title : str
        Above the picture.
    """
    import numpy as np

    layers = sorted({layer for _, layer in changes if layer is not None})
    columns: list[int | None] = [*layers]
    if any(layer is None for _, layer in changes):
        columns.append(None)

    def mean(term: str) -> float:
        return float(np.mean([v for (t, _), v in changes.items() if t == term]))

    terms = sorted({term for term, _ in changes}, key=mean, reverse=True)
    grid = np.array([[changes.get((t, c), np.nan) for c in columns] for t in terms])
    width = max(6.0, 3.2 + 0.6 * len(columns))
    figure, (axis,) = _figure(width, 1.6 + 0.38 * len(terms))
    image = axis.imshow(grid, cmap="viridis", aspect="auto", vmin=0)
    axis.set_xticks(range(len(columns)), [_OUTSIDE if c is None else str(c) for c in columns])
    axis.set_yticks(range(len(terms)), [f"{t}  (mean {mean(t):.3g})" for t in terms])
    axis.set_xlabel("layer")
    middle = np.nanmax(grid) / 2
    for (i, j), value in np.ndenumerate(grid):
        if len(columns) <= 14 and not np.isnan(value):
            shade = "white" if value < middle else "black"
            axis.text(j, i, f"{value:.2g}", ha="center", va="center", color=shade, fontsize=7)
    figure.colorbar(image, ax=axis, label="mean |change|")
    axis.set_title(title, fontsize=10)
    _write(figure, path)
