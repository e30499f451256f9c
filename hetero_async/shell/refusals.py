"""`refusals.json` beside the log: how many deltas of which key were refused, and why. For `hetero-async audit`.

A refused delta changes nothing, so it is not in the log, whose size is not for those to decide who are refused. This
is a note on the side: bounded whatever comes, written every second at most and without fsync, so that a crash
costs the last of it. The server goes on when it cannot be written.
"""

import os
import re
import time
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from hetero_async.errors import ConfigError
from hetero_async.ports import Observer

NAME = "refusals.json"
EVERY_SECONDS = 1.0
# Bounds of the file, some MB at worst: keys are those let in, reasons may quote what a peer wrote.
KEYS_MAX = 4096
KINDS_MAX = 16
KIND_LENGTH_MAX = 160
LAST_LENGTH_MAX = 240
FILE_BYTES_MAX = 64 * 1024 * 1024
OTHER = "other reasons"
# Two refusals of one kind differ in their figures only.
FIGURE = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?")

Text = Annotated[str, Field(max_length=LAST_LENGTH_MAX)]


class Refusals(BaseModel):
    """So many of one kind, and the reason of the last one in full with its time in seconds since 1970."""

    model_config = ConfigDict(extra="forbid", strict=True)
    count: int = Field(ge=1)
    last: Text
    at: float


class Refused(BaseModel):
    """What was refused of one key: reason without its figures → how often. `worker`: who it stood for at the last."""

    model_config = ConfigDict(extra="forbid", strict=True)
    worker: Text
    kinds: dict[Text, Refusals]


NOTES = TypeAdapter(dict[Text, Refused])


class RefusalNotes:
    """Fulfils ports.Observer: passes everything on, and takes note of each event "refused" (worker, key, reason)."""

    def __init__(self, path: Path, observer: Observer) -> None:
        self._path = path
        self._observer = observer
        self._is_written = True
        self._written_at = -EVERY_SECONDS
        self._notes: dict[str, Refused] = {}
        try:
            self._notes = load_refusals(path)
        except ConfigError as error:
            observer.event("refusals counted anew", reason=str(error))

    def event(self, name: str, **fields: object) -> None:
        self._observer.event(name, **fields)
        if name == "refused":
            self._note(str(fields["worker"]), str(fields["key"]), str(fields["reason"]))
        if not self._is_written and time.monotonic() - self._written_at >= EVERY_SECONDS:
            self.write()

    def write(self) -> None:
        """What is not written yet; when it cannot be, that is told, and tried again with a later event."""
        if self._is_written:
            return
        self._written_at = time.monotonic()
        temporary = self._path.with_name(f"{NAME}.new")
        try:
            temporary.write_bytes(NOTES.dump_json(self._notes, indent=1))
            temporary.replace(self._path)
            self._is_written = True
        except OSError as error:
            self._observer.event("refusals not written", path=self._path, reason=error.strerror)

    def _note(self, worker: str, key: str, reason: str) -> None:
        if key not in self._notes and len(self._notes) >= KEYS_MAX:
            return
        self._is_written = False
        refused = self._notes.setdefault(key, Refused(worker=worker, kinds={}))
        refused.worker = worker
        kind = kind_of(reason)
        if kind not in refused.kinds and len(refused.kinds) >= KINDS_MAX:
            kind = OTHER
        count = refused.kinds[kind].count if kind in refused.kinds else 0
        refused.kinds[kind] = Refusals(count=count + 1, last=reason[:LAST_LENGTH_MAX], at=time.time())


def kind_of(reason: str) -> str:
    """A reason without its figures, so that like ones count together."""
    return FIGURE.sub("…", reason)[:KIND_LENGTH_MAX]


def load_refusals(path: Path) -> dict[str, Refused]:
    """By key; empty when nothing was ever refused. Raises ConfigError when the file cannot be read."""
    try:
        with path.open("rb") as file:
            # No more than there is: Python takes as much memory as it is asked to read.
            content = file.read(min(os.fstat(file.fileno()).st_size, FILE_BYTES_MAX))
        return NOTES.validate_json(content)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        detail = error.errors()[0]
        raise ConfigError(f"{path}: is not a list of refusals ({detail['msg']}); remove it") from None
