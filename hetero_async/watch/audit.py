"""Who contributed what, by key: read off a run's log, and off the server's notes of what it refused.

`hetero-async audit` shows it. Reads only, applies no tensor; the server may be running. The log's checksums, its chain
and the hashes of the state are checked on the way.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from hetero_async.core.records import Delta, Entry, Genesis
from hetero_async.core.state import Contribution
from hetero_async.ports import Checkpoint
from hetero_async.replay import fold, start_of
from hetero_async.shell.refusals import Refused
from hetero_async.watch.words import plain

# As many characters of a key tell it from all others of a run, unless somebody made keys for years to prevent it.
SHORT = 8
UNKNOWN = "–"
# Below this width only the columns that matter most are drawn.
WIDE_COLUMNS = 110


@dataclass(slots=True, kw_only=True)
class Row:
    """All that came in under one key. `share` of the run's admitted samples; `norms` is None where the log has none."""

    key: str
    worker: str
    site: str = ""
    lives: int = 0
    deltas: int = 0
    steps: int = 0
    samples: int = 0
    share: float = 0.0
    norms: dict[str, float] | None = None  # min, median, max of the `norms_of` newest deltas
    norms_of: int = 0
    refused: dict[str, int] = field(default_factory=dict)  # reason without its figures → how often
    last_refusal: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    title: str
    shown: Callable[[Row], str]
    is_number: bool = True
    only_wide: bool = False


@dataclass(slots=True, kw_only=True)
class Audit:
    """`from_lsn`: the checkpoint that the log begins behind, 0 for genesis.

    `initial`: the key that the run's first parameters came with, "" when that record is gone.
    """

    run: str
    from_lsn: int
    lsn: int
    initial: str
    rows: list[Row]

    def summary(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def audit(checkpoint: Checkpoint | None, entries: Iterable[Entry], refused: Mapping[str, Refused]) -> Audit:
    """One row a key, the largest contributor first. Raises LogCorrupt where the log contradicts itself."""
    state = start_of(checkpoint)
    norms: dict[str, list[float]] = {}
    initial = ""
    for entry in entries:
        fold(entry, state)
        match entry.record:
            case Genesis() as genesis:
                initial = genesis.key
            case Delta() as delta:
                norms.setdefault(state.members[delta.worker].key, []).append(delta.norm)
    samples = sum(given.samples for given in state.contributions.values())
    rows = [_row(key, given, norms.get(key, []), samples) for key, given in state.contributions.items()]
    by_key = {row.key: row for row in rows}
    for key, notes in refused.items():
        row = by_key.get(key) or Row(key=key, worker=notes.worker)
        row.refused = {kind: noted.count for kind, noted in sorted(notes.kinds.items())}
        row.last_refusal = max(notes.kinds.values(), key=lambda noted: noted.at).last if notes.kinds else ""
        if key not in by_key:
            rows.append(row)
    rows.sort(key=lambda row: (-row.samples, row.worker, row.key))
    return Audit(
        run=state.settings.run if state.settings else "",
        from_lsn=checkpoint.lsn if checkpoint else 0,
        lsn=state.lsn,
        initial=initial,
        rows=rows,
    )


def _row(key: str, given: Contribution, norms: list[float], samples: int) -> Row:
    row = Row(key=key, **asdict(given), share=given.samples / samples if samples else 0.0, norms_of=len(norms))
    if norms:
        row.norms = {"min": min(norms), "median": statistics.median(norms), "max": max(norms)}
    return row


def short(key: str) -> str:
    return f"{key[:SHORT]}…" if len(key) > SHORT else key


def render(audit: Audit) -> RenderableType:
    """The table, and below it what was refused and why. What peers wrote is shown as plain text."""
    start = f"the checkpoint at record {audit.from_lsn}" if audit.from_lsn else "genesis"
    head = Text(plain(f"{audit.run}: records from {start} to {audit.lsn}"))
    if audit.initial:
        head.append(plain(f"; the initial parameters came from {short(audit.initial)}"))
    return Group(head, Rows(audit.rows), *(Text(plain(line)) for line in _refusals(audit.rows)))


@dataclass(frozen=True, slots=True)
class Rows:
    """One line a key, with as many columns as the terminal has room for."""

    rows: Sequence[Row]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = [column for column in COLUMNS if options.max_width >= WIDE_COLUMNS or not column.only_wide]
        table = Table(box=None, pad_edge=False, header_style="dim")
        for column in columns:
            table.add_column(column.title, justify="right" if column.is_number else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*(Text(plain(column.shown(row))) for column in columns))
        yield table


def _norm(name: str) -> Callable[[Row], str]:
    return lambda row: f"{row.norms[name]:.3g}" if row.norms else UNKNOWN


COLUMNS = (
    Column(title="key", shown=lambda row: short(row.key), is_number=False),
    Column(title="worker", shown=lambda row: row.worker, is_number=False),
    Column(title="site", shown=lambda row: row.site, is_number=False, only_wide=True),
    Column(title="lives", shown=lambda row: f"{row.lives:,}", only_wide=True),
    Column(title="deltas", shown=lambda row: f"{row.deltas:,}"),
    Column(title="steps", shown=lambda row: f"{row.steps:,}", only_wide=True),
    Column(title="samples", shown=lambda row: f"{row.samples:,}"),
    Column(title="share", shown=lambda row: f"{row.share:.1%}"),
    Column(title="norm min", shown=_norm("min"), only_wide=True),
    Column(title="norm", shown=_norm("median")),
    Column(title="norm max", shown=_norm("max")),
    Column(title="refused", shown=lambda row: f"{sum(row.refused.values()):,}"),
)


def _refusals(rows: Iterable[Row]) -> Iterable[str]:
    for row in rows:
        for kind, count in row.refused.items():
            yield f"refused {count:,} of {row.worker} ({short(row.key)}): {kind}"
