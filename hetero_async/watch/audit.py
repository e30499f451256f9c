"""Who contributed what, by key: read off a run's log, and off the server's notes of what it refused.

`hetero-async audit` shows it. Reads only, applies no tensor; the server may be running. The log's checksums, its chain
and the hashes of the state are checked on the way.
"""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hetero_async.core.records import Delta, Entry, Genesis
from hetero_async.core.state import Contribution
from hetero_async.ports import Checkpoint
from hetero_async.replay import fold, start_of
from hetero_async.shell.refusals import Refused
from hetero_async.watch.status import plain

# As many characters of a key tell it from all others of a run, unless somebody made keys for years to prevent it.
SHORT = 8
UNKNOWN = "–"


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
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("key", "worker", "site"):
        table.add_column(title, no_wrap=True)
    for title in ("lives", "deltas", "steps", "samples", "share", "norm min", "median", "max", "refused"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in audit.rows:
        table.add_row(*(Text(plain(cell)) for cell in _cells(row)))
    start = f"the checkpoint at record {audit.from_lsn}" if audit.from_lsn else "genesis"
    head = Text(plain(f"{audit.run}: records from {start} to {audit.lsn}"))
    if audit.initial:
        head.append(plain(f"; the initial parameters came from {short(audit.initial)}"))
    return Group(head, table, *(Text(plain(line)) for line in _refusals(audit.rows)))


def _cells(row: Row) -> list[str]:
    norms = [f"{row.norms[name]:.3g}" for name in ("min", "median", "max")] if row.norms else [UNKNOWN] * 3
    counts = [f"{count:,}" for count in (row.lives, row.deltas, row.steps, row.samples)]
    refused = f"{sum(row.refused.values()):,}"
    return [short(row.key), row.worker, row.site, *counts, f"{row.share:.1%}", *norms, refused]


def _refusals(rows: Iterable[Row]) -> Iterable[str]:
    for row in rows:
        for kind, count in row.refused.items():
            yield f"refused {count:,} of {row.worker} ({short(row.key)}): {kind}"
