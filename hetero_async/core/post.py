"""Messages on their way out of the server's machine: at once, or when the record that they speak of is released.

core/server.py puts them in, core/replication.py says what is released. A message that is said again while the first
still waits is kept once, so however long no standby is in reach, what waits stays as much as the workers can ask for.
"""

from hetero_async.core.events import Outgoing
from hetero_async.core.messages import Beat, Message, Nack, Provide, Refused, Rejoin, Wait, Window

# Messages that no record must bear out: whoever gets one while a standby is awaited is not misled. A refusal that
# waited could come after the same delta has been admitted.
UNBOUND = (Beat, Nack, Provide, Refused, Rejoin, Wait, Window)


class Post:
    def __init__(self) -> None:
        self._free: list[Outgoing] = []
        self._held: dict[Outgoing, int] = {}  # → the record that must be released before

    @property
    def held(self) -> int:
        """Messages that wait."""
        return len(self._held)

    def send(self, to: str, message: Message) -> None:
        self._free.append(Outgoing(to, message))

    def send_of(self, lsn: int, to: str, message: Message) -> None:
        """What is said of the run as of that record may have to wait until the record can be relied on."""
        if isinstance(message, UNBOUND):
            self.send(to, message)
        else:
            self._held.setdefault(Outgoing(to, message), lsn)

    def take(self, released: int) -> tuple[Outgoing, ...]:
        """What may leave now; what waited comes in the order in which it was sent."""
        due = [outgoing for outgoing, lsn in self._held.items() if lsn <= released]
        for outgoing in due:
            del self._held[outgoing]
        taken = (*self._free, *due)
        self._free = []
        return taken
