"""Finds in the archive the one history of a run that goes furthest, and brings it back as a log and a checkpoint.

Several servers may have archived: with other boundaries between segments, and a deposed one with records that the run's
history does not contain. So the search begins at the highest term and record and follows the chain hashes back, record
by record, until a checkpoint of that very history or the run's first record. What does not hang together is left out.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import tenacity

from hetero_async.core.records import Entry
from hetero_async.errors import ArchiveAway, ConfigError, LogCorrupt, UserError
from hetero_async.formats.archived import (
    CheckpointName,
    SegmentName,
    checkpoint_name,
    hash_of,
    segment_name,
    whole_files,
)
from hetero_async.formats.segment import FIRST_CHAIN, Scanner, SegmentHeader, segment_file
from hetero_async.formats.snapshot import decode_manifest
from hetero_async.ports import Archive, Archived
from hetero_async.shell.disk import full_is_told, sync_directory, write_durably
from hetero_async.shell.store import LSN_DIGITS, MANIFEST, MODEL

T = TypeVar("T")

# An archive that does not answer for so long is reported; what was fetched by then is not fetched again.
PATIENCE_SECONDS = 120.0
RETRY_SECONDS_MAX = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A stretch of the history: the records of one segment up to where the next part begins."""

    path: Path
    first_lsn: int
    chain: bytes  # before the first
    size_bytes: int
    chains: Mapping[int, bytes]  # after the records that there are checkpoints of


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What the archive holds of the run, `parts` oldest first. They begin at or before the checkpoint's record."""

    run: str
    lsn: int
    term: int
    stored_at: datetime
    checkpoint: CheckpointName | None
    parts: Sequence[Part]


@dataclass(slots=True)
class Retrieval:
    """One search. `scratch` keeps what was fetched; `warnings`: one line for each object that was of no use."""

    archive: Archive
    run: str
    scratch: Path
    fetched: Callable[[str], None]
    warnings: list[str] = field(default_factory=list)
    _objects: Mapping[str, Archived] = field(default_factory=dict)
    _files: dict[str, list[str]] = field(default_factory=dict)
    _segments: list[SegmentName] = field(default_factory=list)
    _checkpoints: list[CheckpointName] = field(default_factory=list)
    _damaged: set[str] = field(default_factory=set)

    def stretch(self, lsn: int, chain: bytes | None) -> tuple[bytes, list[Entry]]:
        """Records from that one on, as one archived segment holds them, with the chain that they continue; if there is
        a choice, that one. No records: none holds it. Raises ArchiveAway."""
        if not self._objects:
            self._look()
        found: tuple[bytes, list[Entry]] = b"", []
        for name in self._segments:
            if not name.first_lsn <= lsn <= name.lsn or str(name) in self._damaged:
                continue
            try:
                found = self._records(name, lsn)
            except LogCorrupt as error:
                self._set_aside(str(name), error)
            if chain in (None, found[0]):
                break
        return found

    def _records(self, name: SegmentName, lsn: int) -> tuple[bytes, list[Entry]]:
        with _opened(self._fetch(str(name)), self.run, name) as scanner:
            chain, entries = scanner.chain, list[Entry]()
            for entry in scanner:
                if entry.lsn >= lsn:
                    entries.append(entry)
                else:
                    chain = scanner.chain
        return chain, entries

    def find(self) -> History:
        """Raises UserError when there is nothing to go on from."""
        self._look()
        tips: list[SegmentName | CheckpointName] = [*self._segments, *self._checkpoints]
        # Of one record both a segment and a checkpoint: the segment, for its records can be checked once more.
        tips.sort(key=lambda tip: (tip.term, tip.lsn, isinstance(tip, SegmentName)), reverse=True)
        for tip in tips:
            if history := self._history(tip):
                self._tell_of_others(history)
                return history
            self.warnings.append(f"nothing leads to record {tip.lsn} of term {tip.term}: {tip} was left out")
        raise UserError(f"the archive holds nothing of run {self.run} that a server could go on from")

    def _look(self) -> None:
        self._objects = listed(self.archive, self.run)
        self._files = whole_files(self._objects)
        self._segments = [found for name in self._files if (found := segment_name(name))]
        self._segments.sort(key=lambda name: (name.first_lsn, -name.lsn, str(name)))  # the longest first
        checkpoints = {checkpoint for name in self._files if (checkpoint := checkpoint_name(name))}
        whole = [name for name in checkpoints if {f"{name}{MODEL}", f"{name}{MANIFEST}"} <= self._files.keys()]
        self._checkpoints = sorted(whole, key=lambda name: (name.lsn, str(name)), reverse=True)  # the newest first

    def _tell_of_others(self, history: History) -> None:
        beyond = [name for name in self._segments if name.term < history.term and name.lsn > history.lsn]
        self.warnings += [f"records of term {name.term} that term {history.term} replaced: {name}" for name in beyond]

    # --- the way back ---

    def _history(self, tip: SegmentName | CheckpointName) -> History | None:
        if isinstance(tip, CheckpointName):
            return self._told(tip, tip, []) if self._is_good(tip) else None
        parts: list[Part] = []
        lsn, chain = tip.lsn, tip.chain
        while part := self._part(lsn, chain):
            parts.insert(0, part)
            for checkpoint in self._checkpoints:
                if part.chains.get(checkpoint.lsn) == checkpoint.chain and self._is_good(checkpoint):
                    return self._told(tip, checkpoint, parts)
            if part.first_lsn == 1 and part.chain == FIRST_CHAIN:
                return self._told(tip, None, parts)
            lsn, chain = part.first_lsn - 1, part.chain
        return None

    def _told(
        self, tip: SegmentName | CheckpointName, checkpoint: CheckpointName | None, parts: Sequence[Part]
    ) -> History:
        files = [name for name in self._files if name.startswith(str(tip))]
        stored_at = max(self._objects[piece].stored_at for name in files for piece in self._files[name])
        return History(
            run=self.run,
            lsn=tip.lsn,
            term=tip.term,
            stored_at=datetime.fromtimestamp(stored_at, UTC),
            checkpoint=checkpoint,
            parts=parts,
        )

    def _part(self, lsn: int, chain: bytes) -> Part | None:
        """Some segment's records up to this one, if they are that history. The longest first: fewer are fetched."""
        for name in self._segments:
            is_other_end = name.lsn == lsn and name.chain != chain
            if not name.first_lsn <= lsn <= name.lsn or is_other_end or str(name) in self._damaged:
                continue
            try:
                if part := self._scanned(name, lsn, chain):
                    return part
            except LogCorrupt as error:
                self._set_aside(str(name), error)
        return None

    def _scanned(self, name: SegmentName, lsn: int, chain: bytes) -> Part | None:
        path = self._fetch(str(name))
        wanted = {checkpoint.lsn for checkpoint in self._checkpoints}
        with _opened(path, self.run, name) as scanner:
            chains = {name.first_lsn - 1: scanner.header.chain}
            for entry in scanner:
                if entry.lsn in wanted:
                    chains[entry.lsn] = scanner.chain
                if entry.lsn == lsn:
                    break
        if scanner.last_lsn != lsn:
            raise LogCorrupt(f"{name}: ends at record {scanner.last_lsn}")
        if scanner.chain != chain:
            return None
        return Part(
            path=path,
            first_lsn=name.first_lsn,
            chain=scanner.header.chain,
            size_bytes=scanner.offset,
            chains=chains,
        )

    def _is_good(self, checkpoint: CheckpointName) -> bool:
        if str(checkpoint) in self._damaged:
            return False
        try:
            packed = self._fetch(f"{checkpoint}{MANIFEST}").read_bytes()
            manifest = decode_manifest(packed, f"{checkpoint}{MANIFEST}")
            if (manifest.run, manifest.lsn, manifest.chain) != (self.run, checkpoint.lsn, checkpoint.chain):
                raise LogCorrupt(f"{checkpoint}: holds another checkpoint than its name says")
            model = self._fetch(f"{checkpoint}{MODEL}")
            with model.open("rb") as file:
                if hash_of(file, model.stat().st_size) != manifest.file_hash:
                    raise LogCorrupt(f"{checkpoint}{MODEL}: fails its checksum")
        except LogCorrupt as error:
            self._set_aside(str(checkpoint), error)
            return False
        return True

    # --- fetching ---

    def _fetch(self, name: str) -> Path:
        """The file, whole and durable; not fetched again when an earlier attempt has."""
        path = self.scratch / name
        size_bytes = sum(self._objects[piece].size_bytes for piece in self._files[name])
        if not path.exists() or path.stat().st_size != size_bytes:
            unfinished = path.with_name(f"{path.name}.new")
            with written(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with unfinished.open("wb") as file:
                    for piece in self._files[name]:
                        file.write(_insist(self.archive.get, piece))
                    file.flush()
                    os.fsync(file.fileno())
                unfinished.replace(path)
            self.fetched(name)
        return path

    def _set_aside(self, name: str, error: LogCorrupt) -> None:
        """Damaged there or on the way here: another attempt fetches it again."""
        self.warnings.append(f"damaged in the archive: {error}")
        self._damaged.add(name)
        path = self.scratch / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _opened(path: Path, run: str, name: SegmentName) -> Iterator[Scanner]:
    with path.open("rb", buffering=0) as file:
        scanner = Scanner(file, name=str(name), is_last=False)
        if (scanner.header.run, scanner.header.first_lsn) != (run, name.first_lsn):
            raise LogCorrupt(f"{name}: holds another segment than its name says")
        yield scanner


def lay_out(history: History, scratch: Path, target: Path) -> None:
    """Make `log` and `checkpoints` in the target, as a server keeps them; durable on return."""
    log, checkpoints = target / "log", target / "checkpoints"
    with written(target):
        for directory in (log, checkpoints):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
        for part in history.parts:
            with part.path.open("rb") as file:
                write_durably(log / segment_file(part.first_lsn), file.read(part.size_bytes))
        if checkpoint := history.checkpoint:
            _lay_out_checkpoint(checkpoint, scratch, checkpoints)
            if not history.parts:  # the next record is the log's first
                first_lsn = checkpoint.lsn + 1
                header = SegmentHeader(run=history.run, first_lsn=first_lsn, chain=checkpoint.chain)
                write_durably(log / segment_file(first_lsn), header.pack())
        for directory in (log, checkpoints, target):
            sync_directory(directory)


def _lay_out_checkpoint(checkpoint: CheckpointName, scratch: Path, checkpoints: Path) -> None:
    directory = checkpoints / f"{checkpoint.lsn:0{LSN_DIGITS}d}"
    directory.mkdir()
    for name in (MODEL, MANIFEST):
        (directory / name).hardlink_to(scratch / f"{checkpoint}{name}")  # never written to again, and may be large
    sync_directory(directory)


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """Raises DiskFull, or ConfigError when nothing can be written there."""
    try:
        with full_is_told(path):
            yield
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error


def listed(archive: Archive, run: str = "") -> Mapping[str, Archived]:
    """Raises ArchiveAway when patience ends."""
    return _insist(archive.list, run)


def _insist(call: Callable[..., T], *arguments: object) -> T:
    """Raises ArchiveAway when patience ends, or an object that was listed is gone."""
    patiently = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(ArchiveAway),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=RETRY_SECONDS_MAX),
        stop=tenacity.stop_after_delay(PATIENCE_SECONDS),
        reraise=True,
    )
    try:
        return patiently(call, *arguments)
    except FileNotFoundError as error:
        raise ArchiveAway(f"{arguments[0]}: was listed, and is gone: {error}".splitlines()[0]) from None
