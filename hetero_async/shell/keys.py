"""Keys as files: the pair that a machine proves itself with, and the list of those that a server lets in.

enrolment.py writes them, servers and workers load them, link.py asks the list about every message. A key is 40
characters of Z85, as libzmq prints it. Nothing here opens a connection or logs a secret.
"""

import contextlib
import fcntl
import json
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

import tenacity
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
# A change of the list takes milliseconds; another command that takes so long hangs.
LOCK_SECONDS, LOCK_RETRY_SECONDS = 5.0, 0.02


def create_keypair(path: Path) -> bytes:
    """Write `path`.secret (mode 0600) and `path`.public, and return the public key. Never overwrites a secret."""
    secret_path = _suffixed(path, ".secret")
    with _locked(path.parent):
        if os.path.lexists(secret_path):
            raise ConfigError(f"{secret_path}: there is one already; for another: hetero-async keys rotate")
        return replace_keypair(path)


def replace_keypair(path: Path) -> bytes:
    """The same, in the place of what is there. A crash leaves the old pair, or the new secret: it counts."""
    public, secret = zmq.curve_keypair()
    while public.startswith(b"-"):  # on a command line it would be taken for an option
        public, secret = zmq.curve_keypair()
    _write(_suffixed(path, ".secret"), _line(SECRET, secret))
    save_public(path, public)
    return public


def public_of(path: Path) -> bytes:
    """The public key that belongs to the secret in `path`.secret; its file is written again if it says otherwise."""
    public = zmq.curve_public(load_secret(_suffixed(path, ".secret")))
    public_path = _suffixed(path, ".public")
    if not public_path.exists() or load_public(public_path) != public:
        save_public(path, public)
    return public


def public_half(secret: bytes) -> bytes:
    """The public key that belongs to a secret one."""
    return zmq.curve_public(secret)


def save_public(path: Path, public: bytes) -> None:
    """Write `path`.public."""
    _write(_suffixed(path, ".public"), _line(PUBLIC, public))


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


def _write(path: Path, content: bytes) -> None:
    try:
        write_durably(path, content)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def _line(kind: str, key: bytes) -> bytes:
    return kind.encode() + b" " + key + b"\n"


def _suffixed(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)  # with_suffix would cut a name that has a dot


# --- who is let in ---


def _checked(key: str) -> str:
    if not is_key(key.encode()):
        raise ValueError("a public key is 40 characters of Z85")
    return key


Role = Literal["worker", "standby", "admin"]


class Entry(BaseModel):
    """One line of allowed.json: who the holder of a key is, and by its role what it may say (core.messages.SAID_BY)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    role: Role
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

    def peers(self) -> list[Peer]:
        """All that are let in, by the file as it is now."""
        self.lookup(b"")
        return list(self._peers.values())

    def told(self) -> dict[str, dict[str, str]]:
        """The entries by key, as `adopt` takes them."""
        return {
            peer.key.decode(): {"role": peer.role, "site": peer.site, "worker": peer.worker} for peer in self.peers()
        }

    def adopt(self, entries: object) -> bool:
        """Have another list in the place of this one; whether it was another. Raises ConfigError."""
        if entries == (self.told() if self.path.exists() else None):
            return False
        try:
            adopted = ALLOWED.validate_python(entries)
        except ValidationError as error:
            raise ConfigError(f"{self.path}: cannot become what was received: {error.errors()[0]['msg']}") from None
        self.change(lambda _: adopted)
        return True

    def admit(self, key: bytes, *, role: Role, site: str, worker: str) -> None:
        """Let a key in, from the next message on."""
        entry = Entry(role=role, site=site, worker=worker)
        self.change(lambda entries: {**entries, key.decode(): entry})

    def revoke(self, key: bytes) -> None:
        """Shut a key out, from the next message on."""
        self.change(lambda entries: {known: entry for known, entry in entries.items() if known != key.decode()})

    def change(self, changed: Callable[[dict[str, Entry]], Mapping[str, Entry]]) -> None:
        """Write what `changed` makes of the entries, by key; nobody else changes them meanwhile. Raises ConfigError."""
        with _locked(self.path.parent):
            entries = changed(_parse(self.path) if self.path.exists() else {})
            written = {key: entry.model_dump() for key, entry in entries.items()}
            ALLOWED.validate_python(written)
            _write(self.path, (json.dumps(written, indent=2) + "\n").encode())
            self.load()

    def _reload(self, signature: tuple[int, ...] | None) -> None:
        """While serving, a file that somebody is editing must neither end the run nor throw everybody out."""
        try:
            self.load()
            self.problem = ""
        except ConfigError as error:
            self._signature = signature
            self.problem = str(error)

    def _sign(self) -> tuple[int, ...] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """For those who change a file in there; whoever only reads it sees it before or after."""
    patiently = tenacity.retry(
        retry=tenacity.retry_if_exception_type(BlockingIOError),
        wait=tenacity.wait_fixed(LOCK_RETRY_SECONDS),
        stop=tenacity.stop_after_delay(LOCK_SECONDS),
        reraise=True,
    )
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ConfigError(f"{directory}: keys cannot be kept here: {error.strerror}") from None
    try:
        patiently(fcntl.flock)(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ConfigError(f"{directory}: another command has been changing the keys for {LOCK_SECONDS:g} s") from None
    finally:
        os.close(descriptor)


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
