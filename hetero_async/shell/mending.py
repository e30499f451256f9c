"""Mends a damaged log in its directory: what is whole stays, what is not comes from elsewhere, record by record.

A record that comes in must continue the one before it, and the next whole one here must continue it: the chain proves
each of them. A segment is written anew beside the damaged one, which is kept; interrupted, the same is done again.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hetero_async.core.records import Entry
from hetero_async.errors import ConfigError, LogCorrupt, UserError
from hetero_async.formats.salvage import Salvaged, salvage
from hetero_async.formats.segment import FIRST_CHAIN, SEGMENT_HEADER_BYTES, SegmentHeader, pack
from hetero_async.shell.disk import DISK, Disk, full_is_told, sync_directory, write_all
from hetero_async.shell.segments import first_lsn_of, segment_paths

# A disk that cannot read a sector says so for the whole page.
PAGE_BYTES = 4096

# Records from that one on, as many as the other side likes to give at once; none: it has no such record. With them the
# chain before the first. It is given the chain that ours have come to, where that is known.
Fetch = Callable[[int, bytes | None], tuple[bytes, Sequence[Entry]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mended:
    """A segment that was written anew. `lsns` came from elsewhere; `is_cut`: nobody knows whether more should come."""

    path: Path
    aside: Path
    lsns: Sequence[int]
    is_cut: bool


@dataclass(slots=True)
class Segment:
    """A segment as it is found, and what its log holds in its place: whole records and fetched ones."""

    path: Path
    content: bytes
    header: SegmentHeader | None  # None: it cannot be used
    whole: Sequence[Salvaged]
    chain: bytes | None = None  # before its first record
    pieces: list[Salvaged | bytes] = field(default_factory=list)
    fetched: list[int] = field(default_factory=list)

    @property
    def is_lost(self) -> bool:
        """Nothing is left that tells how far it went."""
        return self.header is None and not self.whole


class Mending:
    """Of a locked log. `source` is the other side's name, for people."""

    def __init__(self, directory: Path, run: str, source: str, fetch: Fetch, disk: Disk = DISK) -> None:
        self._directory = directory
        self._run = run
        self._source = source
        self._fetch = fetch
        self._disk = disk
        self._coming: dict[int, tuple[bytes, Entry]] = {}

    def mend(self) -> Iterator[Mended]:
        """Each damaged segment, when it is mended and durable. Raises UserError when the source is of no help."""
        paths = segment_paths(self._directory)
        if not paths:
            raise ConfigError(f"{self._directory}: there is no log here")
        chain: bytes | None = FIRST_CHAIN if first_lsn_of(paths[0]) == 1 else None
        for path, following in zip(paths, [*paths[1:], None], strict=True):
            stop = None if following is None else first_lsn_of(following)
            segment = self._read(path, chain)
            chain = self._put_together(segment, stop)
            if _is_damaged(segment, is_last=following is None):
                aside = self._replace(segment)
                yield Mended(path=path, aside=aside, lsns=segment.fetched, is_cut=segment.is_lost and following is None)

    def _read(self, path: Path, chain: bytes | None) -> Segment:
        content = _readable(path)
        try:
            header: SegmentHeader | None = SegmentHeader.unpack(content[:SEGMENT_HEADER_BYTES], str(path))
        except LogCorrupt:
            header = None
        if header is not None and header.run != self._run:
            raise ConfigError(f'{path} belongs to run "{header.run}", not "{self._run}": use another directory')
        if header is not None and header.first_lsn != first_lsn_of(path):
            header = None
        segment = Segment(path=path, content=content, header=header, whole=list(salvage(content)), chain=chain)
        if chain is None:
            first = [record.chain for record in segment.whole if record.lsn == first_lsn_of(path)]
            segment.chain = header.chain if header else (first[0] if first else None)
        return segment

    def _put_together(self, segment: Segment, stop: int | None) -> bytes | None:
        """The segment's records up to the next one's first; the chain after them."""
        whole = {(record.lsn, record.chain): record for record in segment.whole}
        lsns = {record.lsn for record in segment.whole}
        durable_lsn = max((record.durable_lsn for record in segment.whole), default=0)
        lsn, chain = first_lsn_of(segment.path), segment.chain
        while stop is None or lsn < stop:
            record = whole.get((lsn, chain or b""))
            if record is not None:
                segment.pieces.append(record)
                chain = record.chain_after
            elif stop is None and lsn > durable_lsn and not segment.is_lost:
                break  # the log's end, or a torn tail: the next start of the server sees to that
            elif lsn in lsns:
                raise UserError(
                    f"{segment.path}: record {lsn} is whole and continues another history than {self._end(lsn)}"
                )
            else:
                found = self._found(lsn, chain)
                if found is None and segment.is_lost and stop is None:
                    break
                if found is None:
                    raise UserError(f"{self._source} does not hold record {lsn}: name another node, or the archive")
                before, entry = found
                segment.chain = segment.chain or before
                packed, chain = pack(entry, before)
                segment.pieces.append(packed)
                segment.fetched.append(lsn)
            lsn += 1
        return chain

    def _end(self, lsn: int) -> str:
        return f"{self._source}'s" if self._coming else f"record {lsn - 1} of this log"

    def _found(self, lsn: int, chain: bytes | None) -> tuple[bytes, Entry] | None:
        if lsn not in self._coming:
            before, entries = self._fetch(lsn, chain)
            self._coming = {}
            for entry in entries:
                self._coming[entry.lsn] = before, entry
                _, before = pack(entry, before)
        found = self._coming.get(lsn)
        if found is not None and chain not in (None, found[0]):
            raise UserError(
                f"record {lsn} of {self._source} does not continue record {lsn - 1} of this log: "
                "they are of two histories; name a node that this run goes on from, or its archive"
            )
        return found

    def _replace(self, segment: Segment) -> Path:
        """The damaged file stays under another name before its own goes to the mended one."""
        path, temporary = segment.path, segment.path.with_suffix(".new")
        assert segment.chain is not None or not segment.pieces, "the first record comes with its chain"
        chain = segment.chain or FIRST_CHAIN
        header = SegmentHeader(run=self._run, first_lsn=first_lsn_of(path), chain=chain).pack()
        with full_is_told(path):
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                offset = write_all(self._disk, descriptor, [header], 0)
                for piece in segment.pieces:
                    block = piece if isinstance(piece, bytes) else memoryview(segment.content)[piece.offset : piece.end]
                    offset = write_all(self._disk, descriptor, [block], offset)
                self._disk.fsync(descriptor)
            finally:
                os.close(descriptor)
            aside = self._keep_aside(path)
            self._disk.rename(temporary, path)
            sync_directory(self._directory, self._disk)
        return aside

    def _keep_aside(self, path: Path) -> Path:
        """A second name for it; one that an interrupted attempt has given it will do."""
        asides = sorted(path.parent.glob(f"{path.name}.damaged*"))
        aside = next((aside for aside in asides if aside.samefile(path)), None)
        if aside is None:
            aside = path.with_name(f"{path.name}.damaged" + (f".{len(asides)}" if asides else ""))
            self._disk.link(path, aside)
            sync_directory(path.parent, self._disk)
        return aside


def _is_damaged(segment: Segment, *, is_last: bool) -> bool:
    """Whether the file is anything else than its header and its pieces, one behind the other."""
    if segment.header is None or segment.header.chain != segment.chain or segment.fetched:
        return True
    end = SEGMENT_HEADER_BYTES
    for piece in segment.pieces:
        if not isinstance(piece, Salvaged) or piece.offset != end:
            return True
        end = piece.end
    return not is_last and bool(segment.content[end:].strip(b"\0"))


def _readable(path: Path) -> bytes:
    """The file, with zeros for what its disk cannot read any more."""
    try:
        return path.read_bytes()
    except OSError:
        with path.open("rb", buffering=0) as file:
            pages = range(0, os.fstat(file.fileno()).st_size, PAGE_BYTES)
            return b"".join(_page(file.fileno(), offset) for offset in pages)


def _page(descriptor: int, offset: int) -> bytes:
    try:
        return os.pread(descriptor, PAGE_BYTES, offset)
    except OSError:
        return bytes(PAGE_BYTES)
