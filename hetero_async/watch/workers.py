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

from hetero_async.watch.words import duration, plain, speed

Row = Mapping[str, Any]

# From these widths on there is room for more than what tells workers apart and how they fare.
WIDE, WIDER = 110, 150
# Heartbeats come every second; a worker that missed a few is worth a remark.
SILENT_SECONDS = 4.0
# A loop that waits for less of its time is held up by nothing but its own speed.
WAITING_SHARE = 0.1
# Who waits for answers while its link is busy for so much of the time waits for the link, else for the server.
BUSY_SHARE = 0.5
UNKNOWN = "–"
STYLES = {"training": "green", "finished": "green", "away": "red", "was here": "", "had left": ""}
SITE_COLUMNS = ("site", "working", "of these", "trains", "waits", "link", "steps/s", "refused")
# The trouble of a worker that has none.
CALM = 3
# However low the screen is.
ROWS_MIN = 3
# No figure of an honest worker is longer, and no other one shall push the rest off the screen.
CELL_MAX = 40
HEADER_LINES = 2  # a blank one, and the titles


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    title: str
    shown: Callable[[Row], str]
    is_number: bool = True
    from_width: int = 0


def held_up_by(worker: Row) -> str:
    """What sets a worker's pace: "" is its own speed, or not known, or it is away."""
    shares = worker["shares"]
    if not worker["alive"] or shares is None or _waits(worker) < WAITING_SHARE:
        return ""
    if shares["sample_wait"] > shares["answer_wait"]:
        return "no samples"
    return "slow link" if shares["link"] >= BUSY_SHARE else "slow server"


def _is_silent(worker: Row) -> bool:
    return bool(worker["alive"]) and float(worker["seconds_since_heard"]) >= SILENT_SECONDS


def _waits(worker: Row) -> float:
    shares = worker["shares"]
    return float(shares["answer_wait"] + shares["sample_wait"]) if shares else 0.0


def _doing(worker: Row) -> str:
    silent = float(worker["seconds_since_heard"])
    if silent >= SILENT_SECONDS:
        return f"{worker['state']}, silent {duration(silent)}"
    return ", ".join(filter(None, (worker["state"], held_up_by(worker))))


def _share(worker: Row, *names: str) -> str:
    return f"{sum(worker['shares'][name] for name in names):.0%}" if worker["shares"] else UNKNOWN


def _trip(worker: Row) -> str:
    seconds = worker["usage"]["round_trip_seconds"]
    return f"{1000 * seconds:.0f} ms" if seconds and worker["alive"] else UNKNOWN


def _rate(worker: Row, way: str) -> str:
    rate = worker["usage"][way]
    return f"{filesize.decimal(round(rate))}/s" if rate and worker["alive"] else UNKNOWN


COLUMNS = (
    Column(title="site", shown=lambda worker: worker["site"], is_number=False, from_width=WIDER),
    Column(title="worker", shown=lambda worker: worker["worker"], is_number=False),
    Column(title="device", shown=lambda worker: worker["device"], is_number=False, from_width=WIDER),
    Column(title="dtype", shown=lambda worker: worker["dtype"], is_number=False, from_width=WIDE),
    Column(title="state", shown=_doing, is_number=False),
    Column(title="trains", shown=lambda worker: _share(worker, "training")),
    Column(title="waits", shown=lambda worker: _share(worker, "answer_wait", "sample_wait")),
    Column(title="link", shown=lambda worker: _share(worker, "link")),
    Column(title="trip", shown=_trip),
    Column(title="up", shown=lambda worker: _rate(worker, "upload_bytes_per_second"), from_width=WIDE),
    Column(title="down", shown=lambda worker: _rate(worker, "download_bytes_per_second"), from_width=WIDE),
    Column(title="steps/s", shown=lambda worker: speed(worker["steps_per_second"])),
    Column(title="H", shown=lambda worker: str(worker["steps_per_round"]), from_width=WIDE),
    Column(title="stale", shown=lambda worker: str(worker["staleness"]), from_width=WIDER),
    Column(title="samples", shown=lambda worker: f"{worker['samples']:,}", from_width=WIDER),
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
        return -troubled / len(self.workers), -round(self.mean(_waits), 1)

    @property
    def working(self) -> list[Row]:
        return [worker for worker in self.workers if worker["alive"]]

    def mean(self, figure: Callable[[Row], float]) -> float:
        known = [figure(worker) for worker in self.working if worker["shares"]]
        return sum(known) / len(known) if known else 0.0

    def cells(self) -> list[str]:
        causes = [*filter(None, map(held_up_by, self.working)), *("silent" for _ in filter(_is_silent, self.workers))]
        return [
            plain(self.name),
            f"{len(self.working)} of {len(self.workers)}",
            ", ".join(f"{causes.count(cause)} {cause}" for cause in sorted(set(causes))),
            f"{self.mean(lambda worker: worker['shares']['training']):.0%}",
            f"{self.mean(_waits):.0%}",
            f"{self.mean(lambda worker: worker['shares']['link']):.0%}",
            speed(sum(worker["steps_per_second"] for worker in self.working)),
            str(sum(worker["refused"] for worker in self.workers)),
        ]


def _trouble(worker: Row) -> int:
    """0 is the worst."""
    if _is_silent(worker):
        return 0
    if not worker["alive"]:
        return 1
    return 2 if _waits(worker) >= WAITING_SHARE else CALM


def _place(worker: Row) -> tuple[str, int, str]:
    """So that a-10 comes behind a-9."""
    return worker["site"], len(worker["worker"]), worker["worker"]


def _severity(worker: Row) -> tuple[float, float]:
    return (-_waits(worker), -float(worker["refused"])) if _trouble(worker) < CALM else (0.0, 0.0)


def worst_first(workers: Iterable[Row]) -> list[Row]:
    """Those without trouble by name: they shall not change places with every look."""
    return sorted(workers, key=lambda worker: (_trouble(worker), _severity(worker), _place(worker)))


def by_site(workers: Iterable[Row]) -> list[Site]:
    """The worst site first."""
    sites: dict[str, list[Row]] = {}
    for worker in workers:
        sites.setdefault(worker["site"], []).append(worker)
    return sorted((Site(name, members) for name, members in sites.items()), key=lambda site: (site.badness, site.name))


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
    columns = [column for column in COLUMNS if options.max_width >= column.from_width]
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
    text = plain(column.shown(worker))[:CELL_MAX]
    if column.title != "state":
        return Text(text)
    style = STYLES.get(worker["state"], "yellow")
    return Text(text, "red" if _is_silent(worker) else "yellow" if held_up_by(worker) else style)


def _sites(sites: list[Site]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", expand=True)
    for number, title in enumerate(SITE_COLUMNS):
        is_text = number < 3
        table.add_column(title, justify="left" if is_text else "right", ratio=1 if number == 2 else None, no_wrap=True)
    for site in sites:
        table.add_row(*(Text(cell, "yellow" if number == 2 else "") for number, cell in enumerate(site.cells())))
    return table
