"""Draws what plan.py expects, for a terminal: a line a site, then the run, the server, and what will not work.

Bytes are a round's, of each worker; `busy` is the share of time in which the site's link carries them.
"""

import math
from collections.abc import Iterator

from rich import filesize
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hetero_async.watch.plan import DAY_SECONDS, Forecast, SiteForecast
from hetero_async.watch.timing import Question

COLUMNS = ("site", "H", "round", "answer", "stale", "up", "busy", "down", "busy", "trains", "samples/s")

# In place of a figure, where nothing comes of a site.
NEVER = "–"


def render_forecast(question: Question, expected: Forecast) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "site" else "right", no_wrap=True)
    for site in expected.sites:
        table.add_row(*map(Text, _cells(site)))
    figures = Table(box=None, pad_edge=False, show_header=False)
    for name, figure in _figures(question, expected):
        figures.add_row(Text(name, style="dim"), Text(figure))
    warnings = [Text(f"warning: {warning}", style="yellow") for warning in expected.warnings]
    return Group(table, "", figures, *warnings)


def _cells(site: SiteForecast) -> tuple[str, ...]:
    return (
        site.name,
        str(site.steps_per_round),
        _time(site.round_seconds),
        _time(site.answer_seconds),
        f"{site.staleness:.1f}" if math.isfinite(site.staleness) else NEVER,
        _bytes(site.up_bytes_per_round),
        f"{site.up_busy:.0%}",
        _bytes(site.down_bytes_per_round),
        f"{site.down_busy:.0%}",
        f"{site.training_share:.0%}",
        f"{site.samples_per_second:,.1f}",
    )


def _figures(question: Question, expected: Forecast) -> Iterator[tuple[str, str]]:
    share, best = f"{expected.share_of_all:.1%}", f"{expected.times_best_site:.2f}"
    yield (
        "samples",
        f"{expected.samples_per_second:,.1f} a second: {share} of all sites' sum, {best} times the best one's",
    )
    if math.isfinite(expected.days):
        yield "time", f"{_time(expected.days * DAY_SECONDS)} for {question.samples:,} samples"
    yield "joining", f"{_time(expected.joining_seconds)} until all have the first parameters"
    yield "bytes", f"{_bytes(expected.bytes_per_day)} a day over all links"
    fitting, hidden = _from(expected.steps_that_fit), _from(expected.steps_that_hide_links)
    yield "rounds", f"steps_per_round = {question.settings.steps_per_round}; links carry it all {fitting}"
    yield "", f"and are hidden, so that nobody's delta is stale, {hidden}"
    memory, disk = _bytes(expected.server_memory_bytes), _bytes(expected.server_disk_bytes)
    yield "server", f"{memory} of memory, {disk} of disk, one core {expected.server_busy:.0%} busy"
    yield "log", f"{_bytes(expected.log_bytes_per_day)} a day: to a standby, and kept with keep_log"
    host, device = _bytes(expected.worker_memory_bytes), _bytes(expected.device_memory_bytes)
    yield "each worker", f"{host} of its host's memory; {device} of its device's, beside model and optimizer"


def _from(steps: int) -> str:
    return f"from {steps} on" if steps else "with none"


def _bytes(count: float) -> str:
    return filesize.decimal(round(count)) if math.isfinite(count) else NEVER


def _time(seconds: float) -> str:
    if not math.isfinite(seconds):
        return NEVER
    for unit, length in (("days", DAY_SECONDS), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2f} s"
