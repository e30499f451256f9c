"""How much a key may say: messages and bytes a second on one lane, before any of it is decoded.

link.py asks for every message. What is over the quota is dropped: whoever has something to say asks again.
"""

from dataclasses import dataclass

import trio

# A key that was quiet may say so many seconds' worth at once.
BURST_SECONDS = 2.0


@dataclass(slots=True)
class Allowance:
    """What a key may still say now."""

    messages: float
    bytes: float
    at: float


class Quota:
    """One allowance a key; keys are those of the allow-list, so there are not many."""

    def __init__(self, messages_per_second: float, bytes_per_second: float) -> None:
        self._messages_per_second = messages_per_second
        self._bytes_per_second = bytes_per_second
        self._by_key: dict[bytes, Allowance] = {}

    def take(self, key: bytes, size: int) -> bool:
        """Whether one more message, of so many bytes, is within the key's quota; then it is charged."""
        now = trio.current_time()
        messages_max, bytes_max = BURST_SECONDS * self._messages_per_second, BURST_SECONDS * self._bytes_per_second
        left = self._by_key.setdefault(key, Allowance(messages_max, bytes_max, now))
        left.messages = min(messages_max, left.messages + (now - left.at) * self._messages_per_second)
        left.bytes = min(bytes_max, left.bytes + (now - left.at) * self._bytes_per_second)
        left.at = now
        if left.messages < 1 or left.bytes < size:
            return False
        left.messages -= 1
        left.bytes -= size
        return True
