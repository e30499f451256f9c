"""Draws what a run looked like: the validation loss against time, with every kill marked; and how several compare.

Needs matplotlib, which comes with the extra `demo`; nothing else in the package does. Writes a picture, shows none.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from hetero_async.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Vector = numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.float64]]
# (x, loss), ascending in x.
Line = Sequence[tuple[float, float]]

SIZE_INCHES = (9.0, 4.5)
LOSS_COLOR, KILL_COLOR = "#1f5fa8", "#c23b22"
# Labels of kills that are close in time step down, so that they do not cover each other.
LABEL_LEVELS = 4

STUDY_INCHES = (12.0, 5.2)
# Okabe & Ito 2008: told apart by every kind of eye, and without their yellow, which paper swallows.
STUDY_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
FAULT_COLOR = "#777777"
# The first share of a run's tokens, in which every model falls from knowing nothing, is cut off at the top.
FALL_SHARE = 0.08
LABEL_GAP = 0.055  # least distance of two labels, as a share of the axis


def draw_loss(
    points: Sequence[tuple[float, float]], kills: Sequence[tuple[float, str]], path: Path, *, title: str = ""
) -> None:
    """Write a picture (.png or .svg, by the suffix) of `points` (seconds, loss) and `kills` (seconds, who).

    Raises UserError when matplotlib is not installed.
    """
    figure = new_figure(SIZE_INCHES)
    axes = figure.add_subplot()
    _draw_points(axes, points)
    end = max([seconds for seconds, _ in [*points, *kills]], default=1.0)
    for number, (seconds, label) in enumerate(sorted(kills)):
        _draw_kill(axes, seconds, label, level=number % LABEL_LEVELS, is_late=seconds > 0.7 * end)
    axes.set(xlabel="seconds since the start", ylabel="validation loss (nats per byte)", title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def draw_study(
    variants: Mapping[str, Sequence[Sequence[tuple[float, float, float]]]],
    faults: Sequence[tuple[float, str]],
    path: Path,
    *,
    title: str = "",
) -> None:
    """Write a picture of loss against virtual seconds and against tokens, a colour for each variant.

    `variants`: of each seed's run, its points (seconds, tokens, loss); the line is their mean, the band spans them.
    `faults`: (seconds, what). Raises UserError when matplotlib is not installed.
    """
    figure = new_figure(STUDY_INCHES)
    from matplotlib.ticker import EngFormatter

    by_time, by_tokens = figure.subplots(1, 2, sharey=True)
    runs = [points for seeds in variants.values() for points in seeds if points]
    highest, lowest = _limits(runs)
    for axes, column, what in ((by_time, 0, "virtual seconds"), (by_tokens, 1, "tokens (bytes of text)")):
        axes.set(xlabel=what, ylim=(lowest, highest), xlim=(0, max((x[column] for r in runs for x in r), default=1)))
        _draw_variants(axes, variants, column)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    by_tokens.xaxis.set_major_formatter(EngFormatter())
    by_time.set_ylabel("validation loss (nats per byte)")
    for number, (seconds, what) in enumerate(sorted(faults)):
        _draw_fault(by_time, seconds, what, level=number % LABEL_LEVELS)
    figure.suptitle(title)
    figure.savefig(path)


def new_figure(size: tuple[float, float]) -> "Figure":
    try:
        from matplotlib.figure import Figure  # half a second, and a package that a server does not need
    except ImportError:
        raise UserError("a picture needs matplotlib; install it with: pip install 'hetero-async[demo]'") from None
    return Figure(figsize=size, dpi=120, layout="constrained")


def _limits(runs: Sequence[Sequence[tuple[float, float, float]]]) -> tuple[float, float]:
    """Of the loss axis: highest, lowest."""
    settled = [
        loss for points in runs for _, tokens, loss in points if tokens >= FALL_SHARE * points[-1][1]
    ]  # fmt: skip
    highest, lowest = max(settled, default=1.0), min(settled, default=0.0)
    room = 0.06 * (highest - lowest or 1.0)
    return highest + room, lowest - room


def _draw_variants(
    axes: "Axes", variants: Mapping[str, Sequence[Sequence[tuple[float, float, float]]]], column: int
) -> None:
    """Against the points' `column`: 0 is time, of which the label says how much it took; 1 is tokens."""
    ends: list[tuple[float, str, str]] = []
    for number, (name, seeds) in enumerate(variants.items()):
        lines = [[(point[column], point[2]) for point in points] for points in seeds if points]
        grid, losses = _aligned(lines)
        if not grid.size:
            continue
        color = STUDY_COLORS[number % len(STUDY_COLORS)]
        mean = losses.mean(axis=0)
        axes.fill_between(grid, losses.min(axis=0), losses.max(axis=0), color=color, alpha=0.18, linewidth=0)
        axes.plot(grid, mean, color=color, linewidth=1.6)
        axes.plot(grid[-1:], mean[-1:], color=color, marker="o", markersize=4, clip_on=False)
        seconds, loss = (sum(line[-1][place] for line in lines) / len(lines) for place in (0, 1))
        ends.append((float(mean[-1]), f"{name}, {seconds:,.0f} s" if column == 0 else f"{name} {loss:.3f}", color))
    _label_ends(axes, ends)


def _aligned(seeds: Sequence[Line]) -> tuple[Vector, Vector]:
    """A grid that all lines cover, and each line's losses on it; both empty where there is none."""
    start, end = max((line[0][0] for line in seeds), default=0.0), min((line[-1][0] for line in seeds), default=0.0)
    grid = numpy.unique([x for line in seeds for x, _ in line if start <= x <= end])
    losses = [numpy.interp(grid, [x for x, _ in line], [loss for _, loss in line]) for line in seeds]
    return grid, numpy.array(losses)


def _label_ends(axes: "Axes", ends: Sequence[tuple[float, str, str]]) -> None:
    """At the right edge, each at its line's height, or as near to it as the others leave room."""
    lowest, highest = axes.get_ylim()
    heights: list[float] = []
    for loss, _, _ in sorted(ends):
        height = (loss - lowest) / (highest - lowest)
        heights.append(max(height, heights[-1] + LABEL_GAP) if heights else height)
    pushed = heights[-1] - height if heights else 0.0  # upwards, the last one most: all of them share it
    for height, (_, label, color) in zip(heights, sorted(ends), strict=True):
        axes.annotate(
            label, (1.0, height - pushed / 2), xycoords="axes fraction", xytext=(6, 0), textcoords="offset points",
            color=color, va="center",
        )  # fmt: skip


def _draw_fault(axes: "Axes", seconds: float, what: str, *, level: int) -> None:
    axes.axvline(seconds, color=FAULT_COLOR, linestyle=":", linewidth=1)
    axes.annotate(
        what, (seconds, 0.99 - 0.06 * level), xycoords=("data", "axes fraction"), xytext=(4, 0),
        textcoords="offset points", va="top", fontsize=8, color=FAULT_COLOR,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )  # fmt: skip


def _draw_points(axes: "Axes", points: Sequence[tuple[float, float]]) -> None:
    seconds, losses = [point[0] for point in points], [point[1] for point in points]
    axes.plot(seconds, losses, color=LOSS_COLOR, marker="o", markersize=3, linewidth=1.5)
    if points:
        axes.annotate(
            f"{losses[-1]:.2f}", points[-1], xytext=(0, 7), textcoords="offset points", color=LOSS_COLOR, ha="center"
        )


def _draw_kill(axes: "Axes", seconds: float, label: str, *, level: int, is_late: bool) -> None:
    """A line, and the label on the side of it where there is room."""
    axes.axvline(seconds, color=KILL_COLOR, linestyle="--", linewidth=1)
    axes.annotate(
        label,
        (seconds, 0.97 - 0.08 * level),
        xycoords=("data", "axes fraction"),
        xytext=(-5 if is_late else 5, 0),
        textcoords="offset points",
        ha="right" if is_late else "left",
        va="top",
        color=KILL_COLOR,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
    )
