"""Keys as files: the pair that a machine proves itself with, and the list of those that a server lets in.

`init` writes them, servers and workers load them, link.py asks the list about every message. A key is 40 characters of
Z85, as libzmq prints it. Nothing here opens a connection or logs a secret.
"""

import json
import os
import re
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import zmq
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from zmq.utils import z85

from hetero_async.errors import ConfigError
from hetero_async.ports import Peer
from hetero_async.shell.disk import write_durably

# The first word of a key file, so that one kind is not taken for the other.
SECRET, PUBLIC = "curve-secret", "curve-public"
Z85_KEY = re.compile(rb"[0-9a-zA-Z.:+=^!/*?&<>()\[\]{}@%$#-]{40}")
KEY_FILE_BYTES_MAX = 256
ALLOWED_BYTES_MAX = 16 * 1024 * 1024


def create_keypair(path: Path) -> bytes:
    """Write `path`.secret (mode 0600) and `path`.public, and return the public key. Never overwrites a secret."""
    public, secret = zmq.curve_keypair()
    secret_path, public_path = _suffixed(path, ".secret"), _suffixed(path, ".public")
    try:
        descriptor = os.open(secret_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(f"{secret_path}: there is one already; remove it first if the key shall change") from None
    except OSError as error:
        raise ConfigError(f"{secret_path}: cannot be written: {error.strerror}") from None
    with open(descriptor, "wb") as file:
        file.write(_line(SECRET, secret))
    public_path.write_bytes(_line(PUBLIC, public))
    return public


def load_secret(path: Path) -> bytes:
    """The secret key in a file that nobody but its owner can read. Raises ConfigError."""
    mode = _status(path).st_mode
    if stat.S_ISREG(mode) and mode & 0o077:
        raise ConfigError(f"{path}: others can read this secret key (mode {mode & 0o777:03o}); do: chmod 600 {path}")
    return _load(path, SECRET)


def load_public(path: Path) -> bytes:
    """The public key in a file. Raises ConfigError."""
    return _load(path, PUBLIC)


def is_key(text: bytes) -> bool:
    """Whether this is 32 bytes in Z85, in the one way to write them."""
    try:
        return Z85_KEY.fullmatch(text) is not None and len(z85.decode(text)) == 32
    except struct.error:  # five characters that stand for more than 32 bits
        return False


def _load(path: Path, kind: str) -> bytes:
    if not stat.S_ISREG(_status(path).st_mode):
        raise ConfigError(f"{path}: is not a file")
    try:
        with path.open("rb") as file:
            words = file.read(KEY_FILE_BYTES_MAX).split()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    wanted, other = kind.encode(), (PUBLIC if kind == SECRET else SECRET).encode()
    if words[:1] == [other]:
        raise ConfigError(f"{path}: this is a {other.decode()} key, and a {kind} key is needed here")
    if len(words) != 2 or words[0] != wanted or not is_key(words[1]):
        raise ConfigError(f'{path}: is not a key file; it must be one line, "{kind} " and 40 characters of Z85')
    return words[1]


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such key file; copy it from where `hetero-async init` ran") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _line(kind: str, key: bytes) -> bytes:
    return kind.encode() + b" " + key + b"\n"


def _suffixed(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)  # with_suffix would cut a name that has a dot


# --- who is let in ---


def _checked(key: str) -> str:
    if not is_key(key.encode()):
        raise ValueError("a public key is 40 characters of Z85")
    return key


class Entry(BaseModel):
    """One line of allowed.json: who the holder of a key is."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    role: Literal["worker", "admin"]
    site: str = Field(min_length=1, max_length=64)
    worker: str = Field(min_length=1, max_length=64)


ALLOWED = TypeAdapter(dict[Annotated[str, AfterValidator(_checked)], Entry])


class AllowList:
    """allowed.json: public key → role, site, worker. Read again whenever the file has changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem = ""  # why the file as it is now cannot be used; the list as it was last stays in force
        self._peers: dict[bytes, Peer] = {}
        self._signature: tuple[int, ...] | None = None

    def load(self) -> None:
        """Read the file. Raises ConfigError, one line that names file and entry; the list in force is kept then."""
        signature = self._sign()
        if signature is None:
            raise ConfigError(f"{self.path}: there is no such file; it lists the public keys that are let in")
        entries = _parse(self.path)
        self._signature = signature
        self._peers = {key.encode(): Peer(key=key.encode(), **entry.model_dump()) for key, entry in entries.items()}

    def lookup(self, key: bytes) -> Peer | None:
        """Who holds this key, by the file as it is now: one stat a call, a few µs on a local disk."""
        signature = self._sign()
        if signature != self._signature:
            self._reload(signature)
        return self._peers.get(key)

    def admit(self, key: bytes, *, role: Literal["worker", "admin"], site: str, worker: str) -> None:
        """Let a key in, from the next message on."""
        self._change({**self._entries(), key.decode(): {"role": role, "site": site, "worker": worker}})

    def revoke(self, key: bytes) -> None:
        """Shut a key out, from the next message on."""
        self._change({known: entry for known, entry in self._entries().items() if known != key.decode()})

    def _reload(self, signature: tuple[int, ...] | None) -> None:
        """While serving, a file that somebody is editing must neither end the run nor throw everybody out."""
        try:
            self.load()
            self.problem = ""
        except ConfigError as error:
            self._signature = signature
            self.problem = str(error)

    def _entries(self) -> Mapping[str, object]:
        return {key: entry.model_dump() for key, entry in _parse(self.path).items()} if self.path.exists() else {}

    def _change(self, entries: Mapping[str, object]) -> None:
        ALLOWED.validate_python(entries)
        write_durably(self.path, (json.dumps(entries, indent=2) + "\n").encode())
        self.load()

    def _sign(self) -> tuple[int, ...] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size


def _parse(path: Path) -> dict[str, Entry]:
    try:
        with path.open("rb") as file:
            content = file.read(ALLOWED_BYTES_MAX)
        return ALLOWED.validate_python(json.loads(content, object_pairs_hook=_without_duplicates))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        detail = error.errors()[0]
        where = " → ".join(str(part) for part in detail["loc"] if part != "[key]")
        raise ConfigError(f"{path}: {where or 'the file'}: {detail['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not valid JSON: {error}") from None


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("it names the same key twice")
    return unique
