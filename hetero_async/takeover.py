"""How a standby becomes the server: by itself when the witness lets it, or at the operator's word.

Used by standby.py. What makes it safe is not here: a standby that is taking over confirms nothing any more
(core/standby.py), and what was never confirmed was never acknowledged (core/replication.py).
"""

from collections.abc import Iterable, Mapping

import trio

from hetero_async.core.messages import Position
from hetero_async.core.reign import Reign
from hetero_async.core.replication import REPLICATED, Durability
from hetero_async.core.standby import Standby
from hetero_async.errors import WitnessAway
from hetero_async.ports import Observer, Witness
from hetero_async.reigning import Ask

# The vacancy of the server's place is looked for so many times within a lease.
LOOKS_PER_LEASE = 4
LOOK_SECONDS = 0.1
# A server that hands over waits for its successor so long, and a little longer is waited for it here.
HANDOVER_SECONDS = 12.0


class Takeover:
    """`begun` is set when `reign` is ours and the place is to be taken."""

    def __init__(self, *, machine: Standby, witness: Witness | None, rules: Durability, observer: Observer) -> None:
        self.begun = trio.Event()
        self.reign: Reign | None = None
        self._machine = machine
        self._witness = witness
        self._lease_ms = rules.lease_ms
        self._is_replicated = rules.durability == REPLICATED
        self._observer = observer

    # --- by itself ---

    async def watch(self, ask: Ask) -> None:
        """Look several times in a lease whether the server's place is vacant and ours to take."""
        told = ""
        while self._witness is not None:
            await trio.sleep(self._lease_ms / 1000 / LOOKS_PER_LEASE)
            try:
                why = await self._claim_vacancy(self._witness, ask)
            except WitnessAway as error:
                why = str(error)
            if why and why != told:
                self._observer.event("not taking over", reason=why)
            told = why

    async def _claim_vacancy(self, witness: Witness, ask: Ask) -> str:
        """Take over if it is vacant. Says why not, where that is worth telling."""
        machine = self._machine
        if machine.hears_server(_now_ms(), self._lease_ms) and not machine.is_taking_over:
            return ""
        sighting = await witness.look()
        claimed = machine.claim(sighting, _now_ms(), self._lease_ms)
        if claimed is None:
            machine.is_taking_over = False
            is_theirs = sighting.reign is None or sighting.holder
            return "" if is_theirs else "the witness does not know that this standby has all that was acknowledged"
        if claimed == sighting.reign:
            positions = await ask(0)
            if ahead := self._who_is_ahead(positions):
                machine.is_taking_over = False
                return f"{ahead} has more of this reign than this disk has kept"
            promised = max((position.term for position in positions.values() if position is not None), default=0)
            if promised > claimed.term:  # to one whose attempt failed; nobody there follows our own term any more
                claimed = Reign(term=promised + 1, server=machine.name)
        # From here on nothing is confirmed to the old server, whatever becomes of the claim.
        machine.is_taking_over = True
        if await witness.claim(sighting.reign, claimed):
            self._begin(claimed)
        return ""

    def _who_is_ahead(self, positions: Mapping[str, Position | None]) -> str:
        ours = (self._machine.last_term, self._machine.lsn)
        known = ((name, position) for name, position in positions.items() if position is not None)
        return next((name for name, position in known if (position.last_term, position.lsn) > ours), "")

    def _begin(self, reign: Reign) -> None:
        self._observer.event("takes over", term=reign.term, lsn=self._machine.lsn)
        self.reign = reign
        self.begun.set()

    # --- at the operator's word ---

    async def at_word(self, ask: Ask, *, in_spite: bool) -> list[str]:
        """Take over now. What stands against it, in lines, unless `in_spite` of that; none: it has begun."""
        machine = self._machine
        positions = await ask(0)
        terms = [position.term for position in positions.values() if position is not None]
        against = await self._against(positions)
        if machine.lsn == 0 or (against and not in_spite):
            return against
        known = max([machine.term, machine.vowed, *terms])
        reign = Reign(term=_own_term(known, machine.name, positions), server=machine.name)
        machine.vow(reign.term)
        positions = await ask(reign.term)
        refused = [name for name, position in positions.items() if position is not None and not position.is_granted]
        if refused:
            return [f"{name} has granted term {reign.term} to another: try again" for name in refused]
        await self._catch_up(positions)
        machine.is_taking_over = True
        if self._witness is not None:
            sighting = await self._witness.look()
            if sighting.reign is not None:
                reign = Reign(term=max(reign.term, sighting.reign.term + 1), server=machine.name)
            if not await self._witness.claim(sighting.reign, reign):
                machine.is_taking_over = False
                return [f"the witness says that {sighting.holder or 'another'} still serves: stop that one first"]
        self._begin(reign)
        return []

    async def _against(self, positions: Mapping[str, Position | None]) -> list[str]:
        """What would be lost, as far as anybody can tell."""
        machine = self._machine
        if machine.lsn == 0:
            return ["this standby holds no record yet: there is nothing to take over"]
        if self._witness is not None:
            reign = (await self._witness.look()).reign
            has_all = reign is None or machine.name in (reign.server, reign.partner)
            partner = "" if reign is None else reign.partner
            return [] if has_all else [f"the witness knows {partner or 'no standby'} to have all that was acknowledged"]
        return [line for name, position in positions.items() if (line := self._against_one(name, position))]

    def _against_one(self, name: str, position: Position | None) -> str:
        machine = self._machine
        if position is None and name == machine.server:
            # With `replicated`, what the server alone has was never acknowledged.
            lost = f"{name} cannot be asked: what it alone has written down would be lost, {self._known_lag()}"
            return "" if self._is_replicated else lost
        if position is None:
            return f"{name} cannot be asked: what it alone has confirmed would be lost"
        if position.last_term > machine.last_term:
            return f"{name} has records of term {position.last_term}: promote that one instead"
        if position.lsn > machine.lsn and name != machine.server:
            return f"{name} has {position.lsn - machine.lsn} more records: promote that one instead"
        return ""

    def _known_lag(self) -> str:
        machine = self._machine
        seconds = (_now_ms() - machine.heard_ms) / 1000
        return f"{machine.lag} records when it was last heard, {seconds:.0f} s ago"

    async def _catch_up(self, positions: Mapping[str, Position | None]) -> None:
        """A server that is in reach hands over: it has stopped, and its last records come here."""
        goal = max((position.lsn for position in positions.values() if position is not None), default=0)
        with trio.move_on_after(HANDOVER_SECONDS):
            while self._machine.lsn < goal:  # noqa: ASYNC110, the log grows by another task
                await trio.sleep(LOOK_SECONDS)


def _own_term(known: int, name: str, others: Iterable[str]) -> int:
    """The next term that no other node would take: two that are promoted without knowing of each other take two."""
    nodes = sorted([name, *others])
    return known + 1 + (nodes.index(name) - known - 1) % len(nodes)


def _now_ms() -> int:
    return int(trio.current_time() * 1000)
