"""A log's directory as anybody may read it: recovery, verify, export, and the feeding of standbys.

Nothing here locks or changes anything, so it may look on while a server runs. log.py writes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hetero_async.core.records import Entry
from hetero_async.errors import ConfigError, LogCorrupt, UserError
from hetero_async.formats.segment import Scanner

Linked = tuple[bytes, Entry]  # a record and the chain before it


def read_log(directory: Path, run: str | None, after_lsn: int | None = None) -> Iterator[Entry]:
    """Every whole record, from the oldest held or those after `after_lsn`; locks and changes nothing.

    A torn tail is where it ends: a running server may be writing it. Raises LogCorrupt, and ConfigError when there is
    no log or it is another run's. `run` None: whichever it is.
    """
    return (entry for _, entry in read_linked(directory, run, after_lsn))


def read_linked(directory: Path, run: str | None, after_lsn: int | None = None) -> Iterator[Linked]:
    """As `read_log`, each record with the chain before it."""
    if not directory.is_dir():
        raise ConfigError(f"{directory}: there is no log here")
    following: tuple[int, bytes] | None = None
    term = 0
    paths = _paths_after(segment_paths(directory), after_lsn)
    for path in paths:
        with open_segment(path, run, is_last=path is paths[-1], term=term) as scanner:
            if following not in (None, (scanner.header.first_lsn, scanner.header.chain)):
                raise LogCorrupt(f"{path}: does not continue the segment before it: one is missing or exchanged")
            chain = scanner.chain
            for entry in scanner:
                if after_lsn is None or entry.lsn > after_lsn:
                    yield chain, entry
                chain = scanner.chain
            following, term, run = (scanner.last_lsn + 1, scanner.chain), scanner.term, scanner.header.run


def run_of(directory: Path) -> str:
    """The name of the run whose log this is. Raises ConfigError when there is none."""
    paths = segment_paths(directory)
    if not paths:
        raise ConfigError(f"{directory}: there is no log here")
    with open_segment(paths[-1], None, is_last=True) as scanner:
        return scanner.header.run


def end_of(directory: Path) -> tuple[int, int]:
    """Term and number of the last record, (0, 0) when there is none: of two logs of a run, the higher goes further."""
    for path in reversed(segment_paths(directory)):
        with open_segment(path, None, is_last=True) as scanner:
            for _ in scanner:
                pass
            if scanner.term:
                return scanner.term, scanner.last_lsn
    return 0, 0


def _paths_after(paths: list[Path], after_lsn: int | None) -> list[Path]:
    """Without the segments before the one that holds record `after_lsn` + 1. Raises LogCorrupt when that is gone."""
    if after_lsn is None or not paths:
        return paths
    if first_lsn_of(paths[0]) > after_lsn + 1:
        raise LogCorrupt(
            f"{paths[0].parent}: begins at record {first_lsn_of(paths[0])}, record {after_lsn + 1} is missing"
        )
    return paths[sum(first_lsn_of(path) <= after_lsn + 1 for path in paths) - 1 :]


@contextmanager
def open_segment(path: Path, run: str | None, *, is_last: bool, term: int = 0) -> Iterator[Scanner]:
    """Unbuffered: a buffer could show old bytes beside new ones of a segment that is being written."""
    try:
        file = path.open("rb", buffering=0)
    except FileNotFoundError as error:
        raise UserError(f"{path} has been dropped by the running server meanwhile: try again") from error
    with file:
        scanner = Scanner(file, name=str(path), is_last=is_last, term=term)
        if run not in (None, scanner.header.run):
            raise ConfigError(f'{path} belongs to run "{scanner.header.run}", not "{run}": use another directory')
        if scanner.header.first_lsn != first_lsn_of(path):
            raise LogCorrupt(f"{path}: offset 0: begins at record {scanner.header.first_lsn}, its name says otherwise")
        yield scanner


def segment_paths(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("*.log") if path.stem.isdigit())


def first_lsn_of(path: Path) -> int:
    return int(path.stem)
