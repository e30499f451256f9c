"""Checkpoints on disk: `<lsn>/{model.safetensors, manifest.json}`, the two newest that are whole.

One server saves; anybody may load meanwhile, which changes nothing. A checkpoint appears under its name only when
both its files are durable.
"""

import functools
import mmap
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

import safetensors.numpy
import xxhash

from hetero_async.errors import ConfigError, DiskFull, LogCorrupt
from hetero_async.formats.segment import BLOCK_BYTES
from hetero_async.formats.snapshot import Manifest, decode_manifest, encode_arrays, encode_manifest
from hetero_async.ports import Blocking, Checkpoint, ModelSnapshot
from hetero_async.shell.disk import (
    DISK,
    Disk,
    fatal,
    fatal_unless_full,
    sync_directory,
    write_durably,
    write_pieces_durably,
)

Pieces: TypeAlias = Iterable[bytes | memoryview]
Describe: TypeAlias = Callable[[bytes], bytes]  # the manifest, of the array file's hash

KEPT = 2  # so that one may be damaged
MODEL, MANIFEST = "model.safetensors", "manifest.json"
LSN_DIGITS = 20
# A directory being written or deleted; what a crash leaves of it is removed by the next save.
UNFINISHED = ".new"


class CheckpointStore:
    """`warnings`: one line for each damaged checkpoint that `load_newest` passed over."""

    def __init__(self, directory: Path, run: str, blocking: Blocking, disk: Disk = DISK) -> None:
        self.directory = directory
        self.run = run
        self.warnings: list[str] = []
        self._blocking = blocking
        self._disk = disk
        self._damaged: set[int] = set()

    def lsns(self) -> list[int]:
        """The checkpoints there are, oldest first, whole or not."""
        names = (path.name for path in self.directory.glob("[0-9]*"))
        return sorted(int(name) for name in names if len(name) == LSN_DIGITS and name.isdigit())

    def load_newest(self, *, with_arrays: bool = True) -> Checkpoint | None:
        """The newest that is whole; None when there is none: the log is then read from its beginning.

        `with_arrays` false: as `load` has it.
        """
        self.warnings.clear()
        for lsn in reversed(self.lsns()):
            try:
                return self.load(lsn, with_arrays=with_arrays)
            except LogCorrupt as error:
                self.warnings.append(str(error))
                self._damaged.add(lsn)
        return None

    def load(self, lsn: int, *, with_arrays: bool = True) -> Checkpoint:
        """Raises LogCorrupt when it is damaged or gone, ConfigError when it is another run's.

        `with_arrays` false: the state alone, in no time; the large file is not looked at.
        """
        manifest = self._verified(lsn) if with_arrays else self._described(lsn)
        path = self._path(lsn) / MODEL
        try:
            arrays = safetensors.numpy.load_file(path) if with_arrays else {}
        except (OSError, safetensors.SafetensorError) as error:
            raise LogCorrupt(f"{path}: cannot be read: {error}") from error
        return Checkpoint(
            run=manifest.run,
            lsn=manifest.lsn,
            term=manifest.term,
            chain=manifest.chain,
            state=manifest.state,
            state_hash=manifest.state_hash,
            model=ModelSnapshot(arrays=arrays, model_hash=manifest.model_hash),
        )

    def packed(self, lsn: int) -> tuple[int, bytes, bytes | memoryview] | None:
        """The array file is mapped, not read: it may be larger than memory, and stays there while it is mapped."""
        found = [known for known in self.lsns() if lsn in (0, known) and known not in self._damaged]
        if not found:
            return None
        path = self._path(found[-1])
        try:
            with (path / MODEL).open("rb") as file:
                arrays = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return found[-1], (path / MANIFEST).read_bytes(), memoryview(arrays)
        except FileNotFoundError:
            return None  # dropped between two looks

    async def keep(self, manifest: bytes, arrays: bytes) -> Checkpoint:
        return await self._blocking(self._keep, manifest, arrays)

    def _keep(self, packed: bytes, arrays: bytes) -> Checkpoint:
        manifest = decode_manifest(packed, "the checkpoint that came")
        if manifest.run != self.run:
            raise ConfigError(f'the checkpoint that came belongs to run "{manifest.run}", not "{self.run}"')
        self._prepare()
        self._replace(manifest.lsn, lambda _: packed, [arrays])
        return self.load(manifest.lsn)

    def drop_after(self, lsn: int) -> None:
        for later in self.lsns():
            if later > lsn:
                self._drop(later)

    async def save(self, checkpoint: Checkpoint) -> int:
        """Durable and read back on return. Raises DiskFull: the older ones are untouched then.

        Returns up to which record the log is not needed any more; 0: all of it is.
        """
        return await self._blocking(self._save, checkpoint)

    def _save(self, checkpoint: Checkpoint) -> int:
        assert checkpoint.run == self.run, f"a checkpoint of run {checkpoint.run} in the store of {self.run}"
        self._prepare()
        if not self._is_whole(checkpoint.lsn):
            described = functools.partial(_manifest, checkpoint)
            self._replace(checkpoint.lsn, described, encode_arrays(checkpoint.model.arrays))
        kept = [lsn for lsn in self.lsns() if lsn not in self._damaged][-KEPT:]
        for lsn in self.lsns():
            if lsn not in kept:
                self._drop(lsn)
        return kept[0] if len(kept) == KEPT else 0  # a single one may turn out damaged: then all of the log is needed

    def _prepare(self) -> None:
        with fatal_unless_full(self.directory, self._disk):
            self.directory.mkdir(parents=True, exist_ok=True)
            sync_directory(self.directory.parent, self._disk)
            self._remove_unfinished()

    def _replace(self, lsn: int, manifest: Describe, arrays: Pieces) -> None:
        if lsn in self.lsns():
            self._drop(lsn)
        try:
            with fatal_unless_full(self._path(lsn), self._disk):
                self._write(lsn, manifest, arrays)
        except DiskFull:
            with fatal(self.directory, self._disk):
                self._remove_unfinished()
            raise
        self._verified(lsn)
        self._damaged.discard(lsn)

    def _write(self, lsn: int, manifest: Describe, arrays: Pieces) -> None:
        path = self._path(lsn)
        unfinished = path.with_suffix(UNFINISHED)
        unfinished.mkdir()
        file_hash = xxhash.xxh3_128()
        write_pieces_durably(unfinished / MODEL, _hashed(arrays, file_hash), self._disk)
        write_durably(unfinished / MANIFEST, manifest(file_hash.digest()), self._disk)
        self._disk.rename(unfinished, path)
        sync_directory(self.directory, self._disk)

    def _drop(self, lsn: int) -> None:
        """Out of sight with one rename first: nobody shall find half a checkpoint."""
        path = self._path(lsn)
        with fatal(path, self._disk):
            self._disk.rename(path, path.with_suffix(UNFINISHED))
            self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        for path in self.directory.glob(f"*{UNFINISHED}"):
            shutil.rmtree(path)

    def _is_whole(self, lsn: int) -> bool:
        try:
            self._verified(lsn)
        except LogCorrupt:
            return False
        return True

    def _verified(self, lsn: int) -> Manifest:
        """The manifest of a checkpoint whose files hash to what it says."""
        manifest, path = self._described(lsn), self._path(lsn)
        try:
            file_hash = _file_hash(path / MODEL)
        except OSError as error:
            raise LogCorrupt(f"{path}: cannot be read: {error.strerror}") from error
        if file_hash != manifest.file_hash:
            raise LogCorrupt(f"{path / MODEL}: fails its checksum")
        return manifest

    def _described(self, lsn: int) -> Manifest:
        """The manifest, which vouches for itself."""
        path = self._path(lsn)
        try:
            manifest = decode_manifest((path / MANIFEST).read_bytes(), str(path / MANIFEST))
        except OSError as error:
            raise LogCorrupt(f"{path}: cannot be read: {error.strerror}") from error
        if manifest.run != self.run:
            raise ConfigError(f'{path} belongs to run "{manifest.run}", not "{self.run}": use another directory')
        if manifest.lsn != lsn:
            raise LogCorrupt(f"{path}: the manifest is of record {manifest.lsn}")
        return manifest

    def _path(self, lsn: int) -> Path:
        return self.directory / f"{lsn:0{LSN_DIGITS}d}"


def _file_hash(path: Path) -> bytes:
    file_hash = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            file_hash.update(block)
    return file_hash.digest()


def _hashed(pieces: Pieces, file_hash: xxhash.xxh3_128) -> Iterator[bytes | memoryview]:
    for piece in pieces:
        file_hash.update(piece)
        yield piece


def _manifest(checkpoint: Checkpoint, file_hash: bytes) -> bytes:
    return encode_manifest(
        Manifest(
            run=checkpoint.run,
            lsn=checkpoint.lsn,
            term=checkpoint.term,
            chain=checkpoint.chain,
            state=checkpoint.state,
            state_hash=checkpoint.state_hash,
            model_hash=checkpoint.model.model_hash,
            file_hash=file_hash,
        )
    )
