"""Draws a run's workers: who works, who is slow and what holds it up. status.py shows the rest of a run.

All of them, a row each, where they fit; else a row a site and then the workers that fare worst.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich import filesize
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.table import Table
from rich.text import Text

from hetero_async.watch.words import duration, plain

Row = Mapping[str, Any]

# Below this width only the columns that tell workers apart and show how they fare are drawn.
WIDE_COLUMNS = 110
# Heartbeats come every second; a worker that missed a few is worth a remark.
SILENT_SECONDS = 4.0
# A loop that waits for less of its time is held up by nothing but its own speed.
WAITING_SHARE = 0.1
# Who waits for answers while its link is busy for so much of the time waits for the link, else for the server.
BUSY_SHARE = 0.5
UNKNOWN = "–"
STYLES = {"training": "green", "away": "red", "link": "yellow", "server": "yellow", "samples": "yellow"}
SITE_COLUMNS = ("site", "working", "held up", "trains", "waits", "link", "steps/s", "refused")
# The trouble of a worker that has none.
CALM = 3
# However low the screen is.
ROWS_MIN = 3
HEADER_LINES = 2  # a blank one, and the titles


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    title: str
    shown: Callable[[Row], str]
    is_number: bool = True
    only_wide: bool = False


def held_up_by(worker: Row) -> str:
    """compute, link, server or samples: what a worker's pace is set by; "": not known, or it is away."""
    shares = worker["shares"]
    if not worker["alive"] or shares is None:
        return ""
    if shares["answer_wait"] + shares["sample_wait"] < WAITING_SHARE:
        return "compute"
    if shares["sample_wait"] > shares["answer_wait"]:
        return "samples"
    return "link" if shares["link"] >= BUSY_SHARE else "server"


def _is_silent(worker: Row) -> bool:
    return bool(worker["alive"]) and float(worker["seconds_since_heard"]) >= SILENT_SECONDS


def _waits(worker: Row) -> float:
    shares = worker["shares"]
    return float(shares["answer_wait"] + shares["sample_wait"]) if shares else 0.0


def _doing(worker: Row) -> str:
    state, silent = str(worker["state"]), float(worker["seconds_since_heard"])
    return f"{state}, silent {duration(silent)}" if silent >= SILENT_SECONDS else state


def _share(worker: Row, *names: str) -> str:
    return f"{sum(worker['shares'][name] for name in names):.0%}" if worker["shares"] else UNKNOWN


def _trip(worker: Row) -> str:
    seconds = worker["usage"]["round_trip_seconds"]
    return f"{1000 * seconds:.0f} ms" if seconds else UNKNOWN


def _rate(bytes_per_second: float) -> str:
    return f"{filesize.decimal(round(bytes_per_second))}/s" if bytes_per_second else UNKNOWN


COLUMNS = (
    Column(title="site", shown=lambda worker: worker["site"], is_number=False, only_wide=True),
    Column(title="worker", shown=lambda worker: worker["worker"], is_number=False),
    Column(title="device", shown=lambda worker: worker["device"], is_number=False, only_wide=True),
    Column(title="dtype", shown=lambda worker: worker["dtype"], is_number=False, only_wide=True),
    Column(title="state", shown=_doing, is_number=False),
    Column(title="held up by", shown=held_up_by, is_number=False),
    Column(title="trains", shown=lambda worker: _share(worker, "training")),
    Column(title="waits", shown=lambda worker: _share(worker, "answer_wait", "sample_wait")),
    Column(title="link", shown=lambda worker: _share(worker, "link")),
    Column(title="trip", shown=_trip),
    Column(title="up", shown=lambda worker: _rate(worker["usage"]["upload_bytes_per_second"]), only_wide=True),
    Column(title="down", shown=lambda worker: _rate(worker["usage"]["download_bytes_per_second"]), only_wide=True),
    Column(title="steps/s", shown=lambda worker: f"{worker['steps_per_second']:.3g}"),
    Column(title="H", shown=lambda worker: str(worker["steps_per_round"])),
    Column(title="stale", shown=lambda worker: str(worker["staleness"]), only_wide=True),
    Column(title="samples", shown=lambda worker: f"{worker['samples']:,}", only_wide=True),
    Column(title="refused", shown=lambda worker: str(worker["refused"])),
)


@dataclass(frozen=True, slots=True)
class Site:
    """The workers of one site, taken together."""

    name: str
    workers: list[Row]

    @property
    def badness(self) -> tuple[float, ...]:
        """The worst site has the smallest."""
        troubled = sum(_trouble(worker) < CALM for worker in self.workers)
        return -troubled / len(self.workers), -self.mean(_waits)

    @property
    def working(self) -> list[Row]:
        return [worker for worker in self.workers if worker["alive"]]

    def mean(self, figure: Callable[[Row], float]) -> float:
        known = [figure(worker) for worker in self.working if worker["shares"]]
        return sum(known) / len(known) if known else 0.0

    def cells(self) -> list[str]:
        causes = [cause for cause in map(held_up_by, self.working) if cause not in ("", "compute")]
        counts = {cause: causes.count(cause) for cause in sorted(set(causes))}
        silent = sum(map(_is_silent, self.workers))
        remarks = [f"{count} by {cause}" for cause, count in counts.items()] + ([f"{silent} silent"] if silent else [])
        return [
            plain(self.name),
            f"{len(self.working)} of {len(self.workers)}",
            ", ".join(remarks),
            f"{self.mean(lambda worker: worker['shares']['training']):.0%}",
            f"{self.mean(_waits):.0%}",
            f"{self.mean(lambda worker: worker['shares']['link']):.0%}",
            f"{sum(worker['steps_per_second'] for worker in self.working):.3g}",
            str(sum(worker["refused"] for worker in self.workers)),
        ]


def _trouble(worker: Row) -> int:
    """0 is the worst."""
    if _is_silent(worker):
        return 0
    if not worker["alive"]:
        return 1
    return 2 if _waits(worker) >= WAITING_SHARE else CALM


def worst_first(workers: Iterable[Row]) -> list[Row]:
    return sorted(workers, key=lambda worker: (_trouble(worker), -_waits(worker), -worker["refused"], worker["worker"]))


def by_site(workers: Iterable[Row]) -> list[Site]:
    """The worst site first."""
    sites: dict[str, list[Row]] = {}
    for worker in workers:
        sites.setdefault(worker["site"], []).append(worker)
    return sorted((Site(name, members) for name, members in sites.items()), key=lambda site: (site.badness, site.name))


def _place(worker: Row) -> tuple[str, int, str]:
    """So that a-10 comes behind a-9."""
    return worker["site"], len(worker["worker"]), worker["worker"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """The table, with as many columns as the terminal is wide and no more lines than there is room for."""

    workers: list[Row]
    lines: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.workers:
            return
        yield ""
        if len(self.workers) + HEADER_LINES <= self.lines:
            yield _table(sorted(self.workers, key=_place), options)
            return
        sites = by_site(self.workers)
        shown = max(ROWS_MIN, min(len(sites), self.lines // 3))
        yield _sites(sites[:shown])
        if len(sites) > shown:
            yield Text(f"and {len(sites) - shown} more sites, which fare better", "dim")
        yield ""
        rows = max(ROWS_MIN, self.lines - shown - 2 * HEADER_LINES - 2)
        yield _table(worst_first(self.workers)[:rows], options)
        if len(self.workers) > rows:
            yield Text(f"and {len(self.workers) - rows} more workers, which fare better; --json has all", "dim")


def _table(workers: list[Row], options: ConsoleOptions) -> Table:
    columns = [column for column in COLUMNS if options.max_width >= WIDE_COLUMNS or not column.only_wide]
    table = Table(box=None, pad_edge=False, header_style="dim", expand=True)
    for column in columns:
        # The state alone gives way: the figures keep their room.
        ratio, least = (1, 8) if column.title == "state" else (None, None)
        justify: JustifyMethod = "right" if column.is_number else "left"
        table.add_column(column.title, justify=justify, ratio=ratio, min_width=least, no_wrap=True)
    for worker in workers:
        table.add_row(*(_cell(column, worker) for column in columns), style="" if worker["alive"] else "dim")
    return table


def _cell(column: Column, worker: Row) -> Text:
    text = plain(column.shown(worker))
    styles = {"state": "red" if _is_silent(worker) else STYLES.get(text.split(",")[0], "yellow")}
    if column.title == "held up by":
        styles["held up by"] = STYLES.get(text, "")
    return Text(text, styles.get(column.title, ""))


def _sites(sites: list[Site]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", expand=True)
    for number, title in enumerate(SITE_COLUMNS):
        is_text = number < 3
        table.add_column(title, justify="left" if is_text else "right", ratio=1 if number == 2 else None, no_wrap=True)
    for site in sites:
        table.add_row(*(Text(cell, "yellow" if number == 2 else "") for number, cell in enumerate(site.cells())))
    return table
