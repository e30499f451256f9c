"""Draws what studies of learning came to, as tables for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table


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


def _loss(figure: Mapping[str, Any]) -> str:
    if figure["loss"] is None:
        return "diverged"
    spread = f" ± {figure['sd']:.3f}" if figure["seeds"] > 1 else ""
    return f"{figure['loss']:.3f}{spread}"
