"""What happened, one line an event on standard error: for people, or as JSON for what gathers logs.

HETERO_ASYNC_LOG says which, for a process and all that it starts; `--log-format` of a verb sets it.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import UTC, datetime

from hetero_async.errors import ConfigError
from hetero_async.ports import Observer

ENV_LOG = "HETERO_ASYNC_LOG"
LINES, JSON = "lines", "json"

# What others can make us say → the line that sums it up. A disk must not fill with it, nor what matters drown in it.
SUMMED = {
    "refused key": "more strangers",
    "strangers": "more strangers",
    "refused message": "more refused messages",
    "quarantined": "more quarantined",
}
SUM_EVERY_SECONDS = 60.0
NAMES_TOLD_MAX = 5


class LineObserver:
    """Fulfils ports.Observer. `quiet` names events that are too many to be read as they come."""

    def __init__(self, quiet: frozenset[str] = frozenset()) -> None:
        self.quiet = quiet

    def event(self, name: str, **fields: object) -> None:
        if name in self.quiet:
            return
        told = " ".join(f"{key}={value}" for key, value in fields.items() if key != "record")
        record = fields.get("record")
        _print(f"{time.strftime('%H:%M:%S')} {name} {told} {record or ''}".rstrip())


class JsonObserver:
    """Fulfils ports.Observer: each event is one JSON object with `time` (UTC, ISO 8601), `process`, `event`, and then
    its fields. `quiet`: as in LineObserver."""

    def __init__(self, process: str, quiet: frozenset[str] = frozenset()) -> None:
        self.process = process
        self.quiet = quiet

    def event(self, name: str, **fields: object) -> None:
        if name in self.quiet:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        fixed: dict[str, object] = {"time": now, "process": self.process, "event": name}
        told = {key: _plain(value) for key, value in fields.items() if key not in fixed}
        _print(json.dumps(fixed | told, allow_nan=False))


def _print(line: str) -> None:
    with contextlib.suppress(OSError):  # no room, or nobody reads any more: the work goes on
        print(line, file=sys.stderr, flush=True)


def _plain(value: object) -> object:
    """As JSON can say it: a dataclass as an object with its type's name, bytes in hexadecimal, what else there is as
    text."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case bytes():
            return value.hex()
        case list() | tuple():
            return [_plain(item) for item in value]
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
    if is_dataclass(value):
        return {"type": type(value).__name__} | {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    return str(value)


def event_log(process: str, quiet: frozenset[str] = frozenset()) -> Observer:
    """In the form that HETERO_ASYNC_LOG names. `process`: whose events these are. Raises ConfigError."""
    return JsonObserver(process, quiet) if log_format() == JSON else LineObserver(quiet)


def log_format() -> str:
    """Raises ConfigError."""
    chosen = os.environ.get(ENV_LOG) or LINES
    if chosen not in (LINES, JSON):
        raise ConfigError(f"{ENV_LOG}={chosen}: must be {LINES} or {JSON}")
    return chosen


def note(process: str, text: str) -> None:
    """A sentence that is no event of its own."""
    if log_format() == JSON:
        JsonObserver(process).event("note", text=text)
    else:
        _print(f"{process}: {text}")


@dataclass(slots=True)
class Untold:
    """What one line has to sum up: how much came since the last, the first few of whom it came from, and the last."""

    told_at: float
    count: int = 0
    names: dict[object, None] = field(default_factory=dict)
    fields: dict[str, object] = field(default_factory=dict)

    def add(self, fields: dict[str, object]) -> None:
        self.count += 1
        self.fields = fields
        if len(self.names) < NAMES_TOLD_MAX and (name := fields.get("worker", fields.get("key"))):
            self.names[name] = None


class SeldomObserver:
    """Fulfils ports.Observer: passes on what is in SUMMED once a minute at most, the first of it at once.

    Without a clock of its own: a line that has become due goes out with the next event, whatever it is.
    """

    def __init__(self, observer: Observer, now: Callable[[], float] = time.monotonic) -> None:
        self._observer = observer
        self._now = now
        self._untold: dict[str, Untold] = {}  # by the line that sums it up

    def event(self, name: str, **fields: object) -> None:
        self._tell_what_is_due()
        if (line := SUMMED.get(name)) is None or line not in self._untold:
            self._observer.event(name, **fields)
            if line is not None:
                self._untold[line] = Untold(self._now())
        else:
            self._untold[line].add(fields)

    def _tell_what_is_due(self) -> None:
        now = self._now()
        for line, untold in list(self._untold.items()):
            if now - untold.told_at < SUM_EVERY_SECONDS:
                continue
            del self._untold[line]
            if untold.count:
                self._tell(line, untold)
                self._untold[line] = Untold(now)

    def tell_the_rest(self) -> None:
        """At the end, when no event comes any more."""
        for line, untold in self._untold.items():
            if untold.count:
                self._tell(line, untold)
        self._untold.clear()

    def _tell(self, line: str, untold: Untold) -> None:
        names = {"among": ", ".join(map(str, untold.names))} if untold.names else {}
        self._observer.event(
            line, count=untold.count, **names, **{f"last_{key}": told for key, told in untold.fields.items()}
        )


class NullObserver:
    """For what nobody needs to hear of."""

    def event(self, name: str, **fields: object) -> None:
        pass
