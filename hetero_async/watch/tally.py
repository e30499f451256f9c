"""Draws what many simulated runs came to, as tables for a terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


def render_tally(summary: Mapping[str, Any]) -> RenderableType:
    """`summary` is the object that `hetero-async sim --json` prints."""
    figures = Table(title="what came of it", show_header=False)
    failed = len(summary["failures"])
    rows = {
        "seeds": f"{summary['seeds']} run, {failed} failed",
        "deltas": f"{summary['acknowledged']:,} acknowledged, {summary['lost']} lost, {summary['refused']:,} refused",
        "virtual time": f"{summary['virtual_hours']:,.1f} h in {summary['seconds']:,.0f} s",
        "speed": f"{summary['seeds_per_second']} seeds/s",
    }
    for name, told in rows.items():
        figures.add_row(name, told, style="bold red" if name == "seeds" and failed else "")
    faults = Table(title="faults")
    faults.add_column("kind")
    faults.add_column("struck", justify="right")
    for kind, count in summary["faults"].items():
        faults.add_row(kind, f"{count:,}")
    return Group(faults, figures)


def render_failure(failure: Mapping[str, Any], recent: list[str]) -> RenderableType:
    """One failed seed: what broke, its last events, the faults that it needs, and how to see it again."""
    lines = [
        Text(f"seed {failure['seed']}: invariant {failure['invariant']}: {failure['what']}", style="bold red"),
        Text("the last events:"),
        *(Text(f"  {line}", style="dim") for line in recent),
        Text(f"faults that it needs: {len(failure['faults'])}"),
        *(Text(f"  {fault}") for fault in failure["faults"]),
        Text(f"see it again with: {failure['replay']}"),
    ]
    return Group(*lines)
