"""What happened, for people: one line an event on standard error."""

import contextlib
import sys
import time


class LineObserver:
    """Fulfils ports.Observer. `quiet` names events that are too many to be read as they come."""

    def __init__(self, quiet: frozenset[str] = frozenset()) -> None:
        self.quiet = quiet

    def event(self, name: str, **fields: object) -> None:
        if name in self.quiet:
            return
        told = " ".join(f"{key}={value}" for key, value in fields.items() if key != "record")
        record = fields.get("record")
        line = f"{time.strftime('%H:%M:%S')} {name} {told} {record or ''}".rstrip()
        with contextlib.suppress(OSError):  # no room, or nobody reads any more: the work goes on
            print(line, file=sys.stderr, flush=True)


class NullObserver:
    """For what nobody needs to hear of."""

    def event(self, name: str, **fields: object) -> None:
        pass
