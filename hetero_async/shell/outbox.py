"""The worker's outbox: one file a delta, on disk before its first byte is sent, gone when it is answered.

Beside it grows `acknowledged.jsonl`, one line for each delta that the server acknowledged: what this worker was
promised, for anybody who wants to hold the log against it.
"""

import json
import os
from pathlib import Path

import xxhash

from hetero_async.core.messages import Push
from hetero_async.errors import DiskFull, PeerError
from hetero_async.formats import frames
from hetero_async.formats.parts import pack_parts, unpack_parts
from hetero_async.shell.disk import DISK, Disk, failure_is_told, full_is_told, sync_directory, write_all, write_durably

ACKNOWLEDGED = "acknowledged.jsonl"


class FileOutbox:
    """Every method raises HeteroAsyncError when the disk fails."""

    def __init__(self, directory: Path, disk: Disk = DISK) -> None:
        self.directory = directory
        self._disk = disk
        self._hashes: dict[int, str] = {}
        with failure_is_told(directory):
            directory.mkdir(parents=True, exist_ok=True)
            sync_directory(directory.parent, disk)
            self._cut_off_torn_note()

    def save(self, push: Push, payload: bytes) -> None:
        header = frames.encode(push)  # it holds the payload's hash
        content = pack_parts(header, xxhash.xxh3_128_digest(header), payload)
        with failure_is_told(self.directory):
            write_durably(self._path(push.seq), content, self._disk)
        self._hashes[push.seq] = push.payload_hash.hex()

    def drop(self, seq: int, is_acknowledged: bool) -> None:
        """Note the acknowledgement first: a crash in between leaves the delta, which is then acknowledged again.

        Raises DiskFull: the note is owed then, and to be asked for again.
        """
        with failure_is_told(self.directory):
            if is_acknowledged:
                try:
                    self._note(json.dumps({"seq": seq, "payload_hash": self._hashes.get(seq, "")}).encode() + b"\n")
                except DiskFull:
                    self._path(seq).unlink(missing_ok=True)  # which may be all the space that the note wants
                    raise
            self._hashes.pop(seq, None)
            self._path(seq).unlink(missing_ok=True)

    def load(self) -> dict[int, tuple[Push, bytes]]:
        found = {}
        for path in sorted(self.directory.glob("*.delta")):
            try:
                with failure_is_told(path):
                    push, payload = self._read(path)
            except PeerError:
                os.replace(path, path.with_suffix(".damaged"))
                continue
            found[push.seq] = (push, payload)
            self._hashes[push.seq] = push.payload_hash.hex()
        return found

    def acknowledged(self) -> list[int]:
        path = self.directory / ACKNOWLEDGED
        with failure_is_told(path):
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [int(json.loads(line)["seq"]) for line in lines]

    def _note(self, line: bytes) -> None:
        path = self.directory / ACKNOWLEDGED
        with full_is_told(path), path.open("ab", buffering=0) as notes:
            end = notes.tell()
            try:
                write_all(DISK, notes.fileno(), [line], end)
            except OSError:
                notes.truncate(end)  # a full disk takes a part first
                raise

    def _cut_off_torn_note(self) -> None:
        """A power cut may leave a part of a line, which the next would otherwise be written behind."""
        path = self.directory / ACKNOWLEDGED
        if path.exists():
            with path.open("rb+") as notes:
                notes.truncate(notes.read().rfind(b"\n") + 1)

    def _read(self, path: Path) -> tuple[Push, bytes]:
        header, header_hash, payload = (bytes(part) for part in unpack_parts(path.read_bytes(), 3))
        push = frames.decode(header)
        is_whole = xxhash.xxh3_128_digest(header) == header_hash
        if not (isinstance(push, Push) and is_whole and xxhash.xxh3_128_digest(payload) == push.payload_hash):
            raise PeerError(f"{path.name} is not the delta that was saved")
        return push, payload

    def _path(self, seq: int) -> Path:
        return self.directory / f"{seq:012d}.delta"
