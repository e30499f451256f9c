"""Where the archive's objects lie: a bucket of an object store, or a directory. Both fulfil ports.Archive.

Create-only: an object is there whole or not at all, and nobody's later write changes it. No call is retried here;
whoever calls knows how long that makes sense.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import ObjectStore, from_url

from hetero_async.errors import ArchiveAway, ArchiveConflict, ConfigError
from hetero_async.ports import Archive, Archived
from hetero_async.shell.disk import sync_directory

if TYPE_CHECKING:
    from obstore.store import ClientConfig  # it is there for type checkers only

SCHEMES = ("s3", "gs", "az")
# Of one request. A piece is 8 MiB, so a link of 1 Mbit/s is still fast enough.
REQUEST_SECONDS = 90.0
CONNECT_SECONDS = 10.0
MESSAGE_CHARACTERS_MAX = 400
# Beginning of the name of a file being written.
UNFINISHED = ".unfinished-"


def open_archive(url: str, beside: Path, request_seconds: float = 0.0) -> Archive:
    """The archive at a URL or in a directory, relative to `beside`; asks nobody yet. Raises ConfigError.

    Endpoint, region and credentials of an object store come from the environment, as obstore documents them.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return DirectoryArchive((beside / url).resolve())
    if scheme == "file" and rest.startswith("/"):
        return DirectoryArchive(Path(rest))
    if scheme not in SCHEMES or not rest.strip("/"):
        raise ConfigError(f'archive "{url}": must be s3://BUCKET/PREFIX, gs://…, az://…, file:///… or a directory')
    seconds = request_seconds or REQUEST_SECONDS
    # What is given here replaces what obstore would take from the environment.
    client: ClientConfig = {
        "allow_http": os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("true", "1"),
        "timeout": f"{seconds * 1000:.0f}ms",
        "connect_timeout": f"{min(seconds, CONNECT_SECONDS) * 1000:.0f}ms",
    }
    try:
        store = from_url(url, client_options=client, retry_config={"max_retries": 0})
    except (BaseError, ValueError) as error:
        raise ConfigError(f'archive "{url}": cannot be used: {_one_line(error)}') from None
    return ObjectArchive(store)


class ObjectArchive:
    """S3 and what speaks like it, Google Cloud Storage, Azure Blob Storage."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def put_new(self, name: str, content: bytes) -> None:
        try:
            with _away_is_told(name, AlreadyExistsError):
                obstore.put(self._store, name, content, mode="create")
        except AlreadyExistsError:
            # Ours, from an attempt whose answer was lost, or from a server with the same records. A store that is just
            # deciding between two writers (409) says the same, and may then have neither.
            with _away_is_told(name):
                _compare(name, bytes(obstore.get(self._store, name).bytes()), content)

    def list(self, run: str = "") -> dict[str, Archived]:
        with _away_is_told(run or "the archive"):
            found = [meta for batch in obstore.list(self._store, run or None) for meta in batch]
        return {
            meta["path"]: Archived(size_bytes=meta["size"], stored_at=meta["last_modified"].timestamp())
            for meta in found
        }

    def get(self, name: str) -> bytes:
        with _away_is_told(name, FileNotFoundError):
            return bytes(obstore.get(self._store, name).bytes())


class DirectoryArchive:
    """A directory, best one on another disk than the log's."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def put_new(self, name: str, content: bytes) -> None:
        path = self.directory / name
        with _away_is_told(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=UNFINISHED) as unfinished:
                unfinished.write(content)
                unfinished.flush()
                os.fsync(unfinished.fileno())
                try:
                    os.link(unfinished.name, path)  # a rename would replace what is there
                except FileExistsError:
                    _compare(str(path), path.read_bytes(), content)
            for parent in path.parents[: len(Path(name).parts) + 1]:
                sync_directory(parent)

    def list(self, run: str = "") -> dict[str, Archived]:
        with _away_is_told(str(self.directory)):
            paths = [path for path in (self.directory / run).rglob("*") if path.is_file()]
            return {
                path.relative_to(self.directory).as_posix(): Archived(
                    size_bytes=path.stat().st_size, stored_at=path.stat().st_mtime
                )
                for path in paths
                if not path.name.startswith(UNFINISHED)
            }

    def get(self, name: str) -> bytes:
        with _away_is_told(name, FileNotFoundError):
            return (self.directory / name).read_bytes()


def _compare(name: str, found: bytes, content: bytes) -> None:
    if found != content:
        raise ArchiveConflict(
            f"{name}: the archive holds {len(found)} other bytes under this name and keeps them; "
            "look whose they are, remove them or use another archive"
        )


@contextlib.contextmanager
def _away_is_told(name: str, *passed: type[Exception]) -> Iterator[None]:
    """Whatever the store, the network or the disk failed of is ArchiveAway, but for what the caller wants to see."""
    try:
        yield
    except (BaseError, OSError) as error:
        if isinstance(error, passed):
            raise
        raise ArchiveAway(f"{name}: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    """What obstore says over several lines, without the internals that follow."""
    words = str(error).partition("\n\nDebug source")[0].split()
    return " ".join(words)[:MESSAGE_CHARACTERS_MAX] or type(error).__name__
