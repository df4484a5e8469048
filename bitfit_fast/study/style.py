"""How methods look, in every figure of a report, and how labels find their place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Look", "label_ends", "label_points", "looks", "settle_layout"]

#: Colours that people with any colour vision can tell apart, after Paul Tol's muted scheme, and
#: dark enough for text on white.
_COLOURS = (
    "#CC3311", "#0077BB", "#117733", "#882255", "#C0860B", "#2A9BC8", "#332288", "#AA4499",
    "#888822", "#3A9188",
)  # fmt: skip
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
#: The two ends of every comparison look the same in every study.
_FIXED = {"full": ("#000000", "s"), "frozen": ("#888888", "o")}
#: Places of a label around its point, in points: right, left, above, below, and corners.
_OFFSETS = (
    (7, 0, "left", "center"), (-7, 0, "right", "center"), (0, 7, "center", "bottom"),
    (0, -7, "center", "top"), (6, 6, "left", "bottom"), (6, -6, "left", "top"),
    (-6, 6, "right", "bottom"), (-6, -6, "right", "top"), (14, 14, "left", "bottom"),
    (14, -14, "left", "top"), (-14, 14, "right", "bottom"), (-14, -14, "right", "top"),
    (0, 18, "center", "bottom"), (0, -18, "center", "top"), (0, 29, "center", "bottom"),
    (0, -29, "center", "top"),
)  # fmt: skip


@dataclass(frozen=True)
class Look:
    """Colour and marker of a method."""

    colour: str
    marker: str


def looks(methods: Iterable[tuple[str, str]]) -> dict[str, Look]:
    """Return how each method looks.

    Parameters
    ----------
    methods : iterable of (label, method)
        In the order of the study; a label keeps its look in all figures. Colours come again
        after ten methods, with another marker.
    """
    found: dict[str, Look] = {}
    count = 0
    for label, method in methods:
        if label in found:
            continue
        if method in _FIXED and Look(*_FIXED[method]) not in found.values():
            found[label] = Look(*_FIXED[method])
            continue
        turn, place = divmod(count, len(_COLOURS))
        found[label] = Look(_COLOURS[place], _MARKERS[(place + 3 * turn) % len(_MARKERS)])
        count += 1
    return found


def settle_layout(figure: Any) -> None:
    """Lay a figure out, once: what is measured afterwards stays, and it is drawn faster."""
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


def label_points(
    axis: Any, points: Sequence[tuple[float, float]], labels: Sequence[str], colours: Sequence[str]
) -> None:
    """Write a label beside each point, where it covers no other label or point, if possible.

    Parameters
    ----------
    axis : matplotlib.axes.Axes
        With its final limits and scales.
    points : sequence of (x, y)
        In data coordinates.
    labels, colours : sequence of str
        One a point.
    """
    from matplotlib.patheffects import withStroke

    halo = withStroke(linewidth=2.5, foreground="white")
    figure = axis.figure
    settle_layout(figure)
    renderer = figure.canvas.get_renderer()
    frame = axis.get_window_extent(renderer)
    centres = [axis.transData.transform(point) for point in points]
    taken: list[tuple[float, float, float, float]] = [
        (x - 5, y - 5, x + 5, y + 5) for x, y in centres
    ]
    for place, (point, label, colour) in enumerate(zip(points, labels, colours)):
        best: tuple[float, Any, tuple[float, float, float, float]] | None = None
        for dx, dy, horizontal, vertical in _OFFSETS:
            far = abs(dx) + abs(dy) > 16
            text = axis.annotate(
                label, point, (dx, dy), textcoords="offset points", ha=horizontal, va=vertical,
                fontsize=8, color=colour, zorder=4, path_effects=[halo],
                arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5} if far else None,
            )  # fmt: skip
            box = text.get_window_extent(renderer).extents
            cost = sum(
                _overlap(box, other) for i, other in enumerate(taken) if i != place
            ) + 10 * _outside(box, frame.extents)
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost, text, tuple(box))
            else:
                text.remove()
            if cost == 0:
                break
        assert best is not None
        taken.append(best[2])


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _outside(box: Sequence[float], frame: Sequence[float]) -> float:
    return (
        max(0.0, frame[0] - box[0]) + max(0.0, box[2] - frame[2])
        + max(0.0, frame[1] - box[1]) + max(0.0, box[3] - frame[3])
    )  # fmt: skip


def label_ends(axis: Any, ends: Sequence[tuple[float, str, str]], size: float = 8) -> None:
    """Write labels at the right edge, at the heights of lines' ends but not over each other.

    Parameters
    ----------
    axis : matplotlib.axes.Axes
        With its final limits; the labels stand outside of it.
    ends : sequence of (y, label, colour)
        In data coordinates.
    size : float
        Of the text, in points.
    """
    figure = axis.figure
    figure.draw_without_rendering()
    box = axis.get_window_extent()
    gap = 1.25 * size * figure.dpi / 72 / box.height
    low, high = axis.get_ylim()
    order = sorted(range(len(ends)), key=lambda i: ends[i][0])
    heights = [(ends[i][0] - low) / (high - low) for i in order]
    for height, i in zip(_apart(heights, gap), order):
        y, label, colour = ends[i]
        axis.annotate(
            label, (1, (y - low) / (high - low)), (1.05, height),
            xycoords="axes fraction", textcoords="axes fraction", va="center", fontsize=size,
            color=colour, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Move sorted heights as little as is simple so that neighbours are `gap` apart."""
    groups: list[list[float]] = []  # of centre and size each
    for height in heights:
        groups.append([height, 1])
        while len(groups) > 1:
            (a, m), (b, n) = groups[-2], groups[-1]
            if b - a >= gap * (m + n) / 2:
                break
            groups[-2:] = [[(a * m + b * n) / (m + n), m + n]]
    return [c + gap * (i - (n - 1) / 2) for c, n in groups for i in range(int(n))]
