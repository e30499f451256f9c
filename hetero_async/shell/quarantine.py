"""The quarantine's file, quarantine.json beside allowed.json: key → whose it was, and what for.

Read when a server starts and written whenever somebody is shut out or let out; only the server writes it. It is the
server's memory and no more: whoever has lost it learns again after a few strikes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from hetero_async.errors import ConfigError, DiskFull
from hetero_async.ports import Observer
from hetero_async.quarantine import Quarantine, Quarantined
from hetero_async.shell.disk import write_durably
from hetero_async.shell.keys import is_key

QUARANTINE_BYTES_MAX = 16 * 1024 * 1024


def _checked(key: str) -> str:
    if not is_key(key.encode()):
        raise ValueError("a public key is 40 characters of Z85")
    return key


class Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    worker: str = Field(max_length=64)
    reason: str = Field(max_length=1024)


LINES = TypeAdapter(dict[Annotated[str, AfterValidator(_checked)], Line])


def open_quarantine(path: Path, observer: Observer) -> Quarantine:
    """Who is in it by the file, if there is one. Raises ConfigError for a file that cannot be read."""

    def save(keys: Mapping[bytes, Quarantined]) -> None:
        lines = {key.decode(): {"worker": found.worker, "reason": found.reason} for key, found in keys.items()}
        try:
            # A few hundred bytes, once for each key that is shut out or let out: not worth a thread.
            write_durably(path, (json.dumps(lines, indent=2) + "\n").encode())
        except (DiskFull, OSError) as error:
            observer.event("quarantine not written", reason=f"{error}; it holds until the server's end")

    return Quarantine(observer, load_quarantine(path), save)


def load_quarantine(path: Path) -> dict[bytes, Quarantined]:
    """Raises ConfigError, one line that says what to do."""
    try:
        with path.open("rb") as file:
            lines = LINES.validate_json(file.read(QUARANTINE_BYTES_MAX))
    except FileNotFoundError:
        return {}
    except (OSError, ValidationError) as error:
        why = error.strerror if isinstance(error, OSError) else error.errors()[0]["msg"]
        raise ConfigError(f"{path}: cannot be used: {why}; remove it to let everybody out") from None
    return {key.encode(): Quarantined(worker=line.worker, reason=line.reason) for key, line in lines.items()}
