"""What objects in the archive are called: by what they hold, so that no two servers ever want one name for two things.

`RUN/log/FIRST-LAST-TERM-CHAIN-HASH.log` is a log segment, `RUN/checkpoints/LSN-TERM-CHAIN-HASH/` holds a checkpoint's
two files. The chain hash after the last record stands for all records before it: two servers that cut one history at
different places, and two histories of one run (a deposed server's unconfirmed tail), differ in their names. The other
hash is of the bytes. A file is stored in pieces, each small enough for one request; it is there when all of them are.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import xxhash

from hetero_async.formats.segment import BLOCK_BYTES

# One request each: small enough for a slow link (1 Mbit/s takes a minute), large enough that they stay few.
PIECE_BYTES = 8 * 1024 * 1024
SEGMENT_NAME = re.compile(
    r"(?P<run>[^/]+)/log/(?P<first>\d{20})-(?P<last>\d{20})-(?P<term>\d{10})-(?P<chain>[0-9a-f]{32})-(?P<hash>[0-9a-f]{32})\.log"
)
CHECKPOINT_NAME = re.compile(
    r"(?P<run>[^/]+)/checkpoints/(?P<lsn>\d{20})-(?P<term>\d{10})-(?P<chain>[0-9a-f]{32})-(?P<hash>[0-9a-f]{32})/"
)
PIECE_NAME = re.compile(r"(?P<name>.+)\.(?P<index>\d{5})-of-(?P<count>\d{5})")


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentName:
    run: str
    first_lsn: int
    lsn: int  # of the last record
    term: int  # of the last record
    chain: bytes  # after the last record
    file_hash: bytes  # xxh3_128; servers with the same records write down different progress of their disks

    def __str__(self) -> str:
        numbers = f"{self.first_lsn:020d}-{self.lsn:020d}-{self.term:010d}"
        return f"{self.run}/log/{numbers}-{self.chain.hex()}-{self.file_hash.hex()}.log"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointName:
    run: str
    lsn: int
    term: int
    chain: bytes  # after that record
    manifest_hash: bytes  # xxh3_128; the manifest vouches for the other file

    def __str__(self) -> str:
        hashes = f"{self.chain.hex()}-{self.manifest_hash.hex()}"
        return f"{self.run}/checkpoints/{self.lsn:020d}-{self.term:010d}-{hashes}/"


def segment_name(name: str) -> SegmentName | None:
    """None when it is the name of something else."""
    if not (found := SEGMENT_NAME.fullmatch(name)):
        return None
    return SegmentName(
        run=found["run"],
        first_lsn=int(found["first"]),
        lsn=int(found["last"]),
        term=int(found["term"]),
        chain=bytes.fromhex(found["chain"]),
        file_hash=bytes.fromhex(found["hash"]),
    )


def checkpoint_name(name: str) -> CheckpointName | None:
    """The checkpoint that a file belongs to; None when it is the name of something else."""
    if not (found := CHECKPOINT_NAME.match(name)):
        return None
    return CheckpointName(
        run=found["run"],
        lsn=int(found["lsn"]),
        term=int(found["term"]),
        chain=bytes.fromhex(found["chain"]),
        manifest_hash=bytes.fromhex(found["hash"]),
    )


def pieces(name: str, size_bytes: int) -> Iterator[tuple[str, int, int]]:
    """Each piece of a file: its name, where it begins, how many bytes it has."""
    count = max(1, -(-size_bytes // PIECE_BYTES))
    for index in range(count):
        start = index * PIECE_BYTES
        yield f"{name}.{index:05d}-of-{count:05d}", start, min(PIECE_BYTES, size_bytes - start)


def whole_files(objects: Iterable[str]) -> dict[str, list[str]]:
    """Every file of which all pieces are there, and their names in order."""
    found: dict[tuple[str, int], list[str]] = {}
    for name in sorted(objects):
        if piece := PIECE_NAME.fullmatch(name):
            found.setdefault((piece["name"], int(piece["count"])), []).append(name)
    return {name: names for (name, count), names in found.items() if len(names) == count}


def hash_of(file: BinaryIO, size_bytes: int) -> bytes:
    """xxh3_128 of so many bytes from the file's beginning."""
    found = xxhash.xxh3_128()
    file.seek(0)
    while size_bytes and (block := file.read(min(size_bytes, BLOCK_BYTES))):
        found.update(block)
        size_bytes -= len(block)
    return found.digest()
