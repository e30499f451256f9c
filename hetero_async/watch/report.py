"""Draws what a run looked like: the validation loss against time, with every kill marked.

Needs matplotlib, which comes with the extra `demo`; nothing else in the package does. Writes a picture, shows none.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hetero_async.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE_INCHES = (9.0, 4.5)
LOSS_COLOR, KILL_COLOR = "#1f5fa8", "#c23b22"
# Labels of kills that are close in time step down, so that they do not cover each other.
LABEL_LEVELS = 4


def draw_loss(
    points: Sequence[tuple[float, float]], kills: Sequence[tuple[float, str]], path: Path, *, title: str = ""
) -> None:
    """Write a picture (.png or .svg, by the suffix) of `points` (seconds, loss) and `kills` (seconds, who).

    Raises UserError when matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # half a second, and a package that a server does not need
    except ImportError:
        raise UserError("a picture needs matplotlib; install it with: pip install 'hetero-async[demo]'") from None
    figure = Figure(figsize=SIZE_INCHES, dpi=120, layout="constrained")
    axes = figure.add_subplot()
    _draw_points(axes, points)
    end = max([seconds for seconds, _ in [*points, *kills]], default=1.0)
    for number, (seconds, label) in enumerate(sorted(kills)):
        _draw_kill(axes, seconds, label, level=number % LABEL_LEVELS, is_late=seconds > 0.7 * end)
    axes.set(xlabel="seconds since the start", ylabel="validation loss (nats per byte)", title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


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
