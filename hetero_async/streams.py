"""Where a worker's stream stands, kept with each delta, so that its next life goes on behind what was trained.

For streams with `state_dict` and `load_state_dict`, as torchdata and Hugging Face have them. The state after a round's
last batch is written before its delta is: whichever deltas the next life finds to be safe, it knows where the stream
stood behind the newest of them. What comes after it, no delta has been made of.
"""

import json
from collections import deque
from collections.abc import Collection
from typing import Any, Protocol

from hetero_async.core import ranges
from hetero_async.core.messages import Push
from hetero_async.errors import UserError
from hetero_async.shell.kept import KeptFile
from hetero_async.shell.outbox import FileOutbox

# States of so many deltas are kept: more than an outbox ever holds.
STATES_KEPT = 16


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None: ...


def is_stateful(stream: object) -> bool:
    return hasattr(stream, "state_dict") and hasattr(stream, "load_state_dict")


class Place:
    def __init__(self, file: KeptFile) -> None:
        self._file = file
        self._stream: Stateful | None = None
        self._noted: deque[tuple[int, str]] = deque()  # a position of each batch, and the state after it
        self._kept: dict[int, str] = {}  # by seq

    def open(self, stream: Stateful, safe: Collection[int]) -> None:
        """Have the stream go on behind the newest delta that is safe: acknowledged, or in the outbox."""
        self._stream = stream
        content = self._file.load()
        kept = {int(seq): state for seq, state in json.loads(content).items()} if content else {}
        self._kept = {seq: state for seq, state in kept.items() if seq in safe}
        if self._kept:
            stream.load_state_dict(json.loads(self._kept[max(self._kept)]))

    def note(self, position: int) -> None:
        """In the user's thread: the batch that this position was drawn for has come. Raises UserError."""
        if self._stream is None:
            return
        state = self._stream.state_dict()
        try:
            self._noted.append((position, json.dumps(state)))
        except (TypeError, ValueError) as error:
            raise UserError(f"the stream's state_dict cannot be written as JSON: {error}") from None

    def keep(self, push: Push) -> None:
        """Before a delta goes to the outbox: durable on return. Raises DiskFull."""
        reported = [at for at, (position, _) in enumerate(self._noted) if _holds(push, position)]
        if not reported:
            return
        for _ in range(reported[-1] + 1):  # with those of rounds that were thrown away
            _, state = self._noted.popleft()
        self._kept = dict(sorted({**self._kept, push.seq: state}.items())[-STATES_KEPT:])
        self._file.save(json.dumps(self._kept).encode())


def _holds(push: Push, position: int) -> bool:
    return ranges.contains(push.ranges, ((position, position + 1),))


class PlacedOutbox(FileOutbox):
    """An outbox that keeps the stream's place with each delta."""

    def __init__(self, place: Place, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._place = place

    def save(self, push: Push, payload: bytes) -> None:
        self._place.keep(push)
        super().save(push, payload)

    def safe(self) -> list[int]:
        """Deltas that are acknowledged, or will be offered until they are answered."""
        return [*self.acknowledged(), *(int(path.stem) for path in self.directory.glob("*.delta"))]
