"""Draws what studies of learning came to: tables for a terminal, and a picture of all cells."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from hetero_async.watch.report import new_figure

MET_COLOR, MISSED_COLOR, GOAL_COLOR = "#009e73", "#c23b22", "#777777"
ROW_INCHES, EDGE_INCHES, WIDTH_INCHES = 0.32, 1.0, 9.0


def render_comparison(title: str, figures: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One line a variant, the best first. `figures`: as `hetero-async study --json` prints them."""
    table = Table(title=title)
    for column in ("variant", "loss", "virtual time", "up a round", "down a round", "idle"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for figure in sorted(figures, key=lambda figure: (figure["loss"] is None, figure["loss"])):
        table.add_row(
            figure["variant"],
            _loss(figure),
            f"{figure['virtual_seconds']:,.0f} s",
            f"{figure['bytes_up_per_round'] / 1e3:,.1f} kB",
            f"{figure['bytes_down_per_round'] / 1e3:,.1f} kB",
            f"{figure['idle_share']:.1%}",
        )
    return table


def render_verdicts(verdicts: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One line a cell: what it is measured by, what was reached, and whether that was the goal."""
    table = Table(title="learning: what had to be reached, and what was")
    for column in ("cell", "yardstick", "reached", "excess", "goal", "time", "time to it", "met"):
        table.add_column(column, justify="left" if column in ("cell", "yardstick") else "right")
    for verdict in verdicts:
        yardstick, excess, time = verdict["yardstick"], verdict["excess"], verdict["time_ratio"]
        table.add_row(
            verdict["cell"],
            f"{yardstick['variant']}: {_loss(yardstick)}",
            _loss(verdict["reached"]),
            "diverged" if excess is None else f"{excess:+.3f}",
            f"{verdict['goal']:+.2f}",
            "" if time is None else f"{time:.2f} of {verdict['time_share']:.2f}",
            "never" if verdict["time_to_yardstick"] is None else f"{verdict['time_to_yardstick']:.2f}",
            "yes" if verdict["met"] else "no",
            style="" if verdict["met"] else "bold red",
        )
    return table


def draw_verdicts(verdicts: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One row a cell: how far the loss is from the yardstick's, with the standard deviation, and where the goal is.

    What diverged has no dot. Raises UserError when matplotlib is not installed.
    """
    figure = new_figure((WIDTH_INCHES, EDGE_INCHES + ROW_INCHES * len(verdicts)))
    axes = figure.subplots()
    for row, verdict in enumerate(verdicts):
        color = MET_COLOR if verdict["met"] else MISSED_COLOR
        axes.plot([verdict["goal"]] * 2, [row - 0.3, row + 0.3], color=GOAL_COLOR, linewidth=1.5)
        if verdict["excess"] is not None:
            spread = verdict["reached"]["sd"]
            axes.errorbar(verdict["excess"], row, xerr=spread, color=color, marker="o", markersize=5, capsize=2)
            axes.annotate(
                f"{verdict['excess']:+.3f}", (verdict["excess"], row), xytext=(0, 5), textcoords="offset points",
                ha="center", fontsize=7, color=color,
            )  # fmt: skip
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(verdicts)), [verdict["cell"] for verdict in verdicts], fontsize=8)
    axes.set_ylim(len(verdicts) - 0.4, -0.6)
    axes.set_xlabel("nats per byte above the yardstick; grey: the goal")
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _loss(figure: Mapping[str, Any]) -> str:
    if figure["loss"] is None:
        return "diverged"
    spread = f" ± {figure['sd']:.3f}" if figure["seeds"] > 1 else ""
    return f"{figure['loss']:.3f}{spread}"
