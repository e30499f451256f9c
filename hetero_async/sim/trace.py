"""What happened in a simulated world, line by line: virtual time, who, what. Its hash is the run's fingerprint."""

from collections import deque
from collections.abc import Callable
from dataclasses import fields

import trio
import xxhash

from hetero_async.core.messages import Message

# Lines shown with a failure.
RECENT_LINES = 40
SHOWN_FIELDS = ("seq", "number", "kind", "publish", "anchor", "ranges", "index", "first", "incarnation", "reason")
SHOWN_LENGTH_MAX = 48


class Trace:
    def __init__(self, echo: Callable[[str], None] | None = None) -> None:
        """`echo` is given every line as it comes."""
        self.recent: deque[str] = deque(maxlen=RECENT_LINES)
        self.events = 0
        self._echo = echo
        self._hash = xxhash.xxh3_128()

    def note(self, who: str, what: str) -> None:
        line = f"{trio.current_time():10.4f}  {who:<12} {what}"
        self.events += 1
        self._hash.update(line.encode())
        self.recent.append(line)
        if self._echo is not None:
            self._echo(line)

    @property
    def fingerprint(self) -> str:
        """Equal for two runs of one seed, always."""
        return self._hash.hexdigest()


def shown(message: Message) -> str:
    """A message in a few words."""
    names = {field.name for field in fields(message)}
    told = (f"{name}={getattr(message, name)!s:.{SHOWN_LENGTH_MAX}}" for name in SHOWN_FIELDS if name in names)
    return " ".join([type(message).__name__, *told])
