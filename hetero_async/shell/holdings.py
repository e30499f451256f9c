"""What a server's directory has for the archive: log segments that are closed, and the newest checkpoint.

It reads beside the server, which may append, close a segment, or delete any of these files meanwhile: what is handed
out is open and stays readable. A segment is scanned from end to end first, so that no damaged one is ever archived.
"""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

import xxhash

from hetero_async.formats.archived import CheckpointName, SegmentName, hash_of
from hetero_async.formats.segment import Scanner
from hetero_async.formats.snapshot import decode_manifest
from hetero_async.ports import Held
from hetero_async.shell.segments import first_lsn_of, segment_paths
from hetero_async.shell.store import LSN_DIGITS, MANIFEST, MODEL


class DirectoryHoldings:
    def __init__(self, log: Path, checkpoints: Path) -> None:
        self.log = log
        self.checkpoints = checkpoints

    def genesis(self) -> bytes | None:
        paths = segment_paths(self.log)
        if not paths or first_lsn_of(paths[0]) != 1:
            return None
        with paths[0].open("rb", buffering=0) as file:
            scanner = Scanner(file, name=str(paths[0]), is_last=len(paths) == 1)
            return scanner.chain if next(iter(scanner), None) else None

    def segment_after(self, lsn: int, with_open: bool) -> Held | None:
        paths = segment_paths(self.log)
        newer = [path for path, last in zip(paths, _last_lsns(paths), strict=True) if last is None or last > lsn]
        if not newer or (newer[0] is paths[-1] and not with_open):
            return None
        path = newer[0]
        with contextlib.ExitStack() as unless_handed_out:
            file = unless_handed_out.enter_context(path.open("rb", buffering=0))
            scanner = Scanner(file, name=str(path), is_last=path is paths[-1])
            for _ in scanner:
                pass
            if scanner.last_lsn < max(lsn + 1, scanner.header.first_lsn):
                return None
            unless_handed_out.pop_all()
        name = SegmentName(
            run=scanner.header.run,
            first_lsn=scanner.header.first_lsn,
            lsn=scanner.last_lsn,
            term=scanner.term,
            chain=scanner.chain,
            file_hash=hash_of(file, scanner.offset),
        )
        return Held(name=str(name), file=file, size_bytes=scanner.offset, lsn=scanner.last_lsn)

    def checkpoint_after(self, lsn: int) -> Sequence[Held]:
        paths = sorted(self.checkpoints.glob("[0-9]" * LSN_DIGITS))
        if not paths or int(paths[-1].name) <= lsn:
            return ()
        packed = (paths[-1] / MANIFEST).read_bytes()
        known = decode_manifest(packed, str(paths[-1] / MANIFEST))
        directory = CheckpointName(
            run=known.run,
            lsn=known.lsn,
            term=known.term,
            chain=known.chain,
            manifest_hash=xxhash.xxh3_128_digest(packed),
        )
        model = (paths[-1] / MODEL).open("rb")
        # The manifest last: where it is, all is.
        return [
            Held(name=f"{directory}{name}", file=file, size_bytes=file.seek(0, 2), lsn=known.lsn)
            for name, file in ((MODEL, model), (MANIFEST, io.BytesIO(packed)))
        ]


def _last_lsns(paths: Sequence[Path]) -> list[int | None]:
    """The last record of each segment, as the name of the next one tells it; None for the open one."""
    following = [first_lsn_of(path) - 1 for path in paths[1:]]
    return [*following, *([None] if paths else [])]
