"""What became of a plan: its figures beside those of a run, for `plan --against`. measuring.py reads them off the run.

A share or a staleness is off by so much; everything else by a share of what was measured.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich import filesize
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hetero_async.watch.plan import DAY_SECONDS, Forecast
from hetero_async.watch.timing import Question
from hetero_async.watch.words import duration

TOLERANCE, STALENESS_TOLERANCE = 0.1, 0.35  # the latter in merges, or that share where it is more
COLUMNS = ("", "planned", "measured", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteOutcome:
    """Of all its workers together."""

    name: str
    up_bytes_per_second: float
    down_bytes_per_second: float
    training_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run was while it was steady. Bytes are those of messages; NaN: nobody noted that."""

    seconds: float  # that were looked at
    merges: int  # in them
    sites: tuple[SiteOutcome, ...]
    samples_per_second: float
    merges_per_second: float
    delta_bytes: float
    staleness: float  # merges, of all deltas
    server_memory_bytes: float
    server_disk_bytes: float
    run_seconds: float  # from the first worker to the last sample; NaN while it goes on


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """`off`: of what was measured, or in the figure's own unit where `is_share`."""

    name: str
    planned: float
    measured: float
    is_share: bool = False
    right_within: float = TOLERANCE  # so far off, and it was right
    shown: Callable[[float], str] = "{:,.3g}".format

    @property
    def off(self) -> float:
        difference = self.planned - self.measured
        return difference if self.is_share or self.measured == 0 else difference / self.measured

    @property
    def is_right(self) -> bool:
        return abs(self.off) <= self.right_within

    def told(self) -> dict[str, float | bool]:
        """As --json has it."""
        return {"planned": self.planned, "measured": self.measured, "off": self.off, "is_right": self.is_right}


def lines(question: Question, expected: Forecast, outcome: Outcome) -> list[Line]:
    """Of what both know."""
    return [line for line in _lines(question, expected, outcome) if math.isfinite(line.planned + line.measured)]


def _lines(question: Question, expected: Forecast, outcome: Outcome) -> Iterator[Line]:
    yield Line(name="samples/s", planned=expected.samples_per_second, measured=outcome.samples_per_second)
    alone = expected.samples_per_second / expected.share_of_all if expected.share_of_all else math.nan
    yield Line(
        name="of all sites' sum", planned=expected.share_of_all, measured=outcome.samples_per_second / alone,
        is_share=True, shown="{:.1%}".format,
    )  # fmt: skip
    yield Line(name="seconds a merge", planned=1 / expected.merges_per_second, measured=1 / outcome.merges_per_second)
    yield Line(name="a delta", planned=question.delta_bytes, measured=outcome.delta_bytes, shown=_bytes)
    yield Line(
        name="staleness", planned=_staleness(question, expected), measured=outcome.staleness, is_share=True,
        right_within=max(STALENESS_TOLERANCE, TOLERANCE * outcome.staleness),
    )  # fmt: skip
    measured = {site.name: site for site in outcome.sites}
    for site, plan in zip(question.sites, expected.sites, strict=True):
        if (found := measured.get(site.name)) is None:
            continue
        for way, planned, was, rate in (
            ("sends", plan.up_bytes_per_second, found.up_bytes_per_second, site.up),
            ("receives", plan.down_bytes_per_second, found.down_bytes_per_second, site.down),
        ):
            yield Line(name=f"{site.name} {way}", planned=planned, measured=was, shown=_rate)
            if math.isfinite(rate):
                yield Line(
                    name=f"{site.name} {way}, of its link", planned=planned / rate, measured=was / rate, is_share=True,
                    shown="{:.1%}".format,
                )  # fmt: skip
        yield Line(
            name=f"{site.name} trains", planned=plan.training_share, measured=found.training_share, is_share=True,
            shown="{:.0%}".format,
        )  # fmt: skip
    memory, disk = outcome.server_memory_bytes, outcome.server_disk_bytes
    yield Line(name="server's memory", planned=expected.server_memory_bytes, measured=memory, shown=_bytes)
    yield Line(name="server's disk", planned=expected.server_disk_bytes, measured=disk, shown=_bytes)
    yield Line(name="the whole run", planned=DAY_SECONDS * expected.days, measured=outcome.run_seconds, shown=duration)


def _staleness(question: Question, expected: Forecast) -> float:
    """Of all deltas: who pushes more often counts more."""
    pushes = [
        site.workers / plan.round_seconds for site, plan in zip(question.sites, expected.sites, strict=True)
    ]  # fmt: skip
    weighed = [push * plan.staleness for push, plan in zip(pushes, expected.sites, strict=True) if push]
    return sum(weighed) / sum(pushes) if weighed else math.inf


def render_outcome(found: list[Line], outcome: Outcome) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for line in found:
        off = f"{100 * line.off:+.1f} points" if line.shown(1.0).endswith("%") else f"{line.off:+.2f}"
        off = off if line.is_share else f"{line.off:+.1%}"
        style = "" if line.is_right else "yellow"
        table.add_row(Text(line.name, "dim"), line.shown(line.planned), line.shown(line.measured), Text(off, style))
    told = f"measured over {duration(outcome.seconds)} and {outcome.merges} merges, while the run was steady"
    return Group(table, "", Text(told, "dim"))


def _bytes(count: float) -> str:
    return filesize.decimal(round(count))


def _rate(bytes_per_second: float) -> str:
    return f"{_bytes(bytes_per_second)}/s"
