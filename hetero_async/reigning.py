"""How a server comes to reign, and keeps the witness knowing that it does.

`begin` is asked before a server serves, `Keeper` runs beside it. Both take nothing for granted: an answer that did not
come may have been a yes.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

import trio

from hetero_async.core.events import Followed, Witnessed
from hetero_async.core.messages import Position, Redirect
from hetero_async.core.reign import Reign
from hetero_async.core.replication import Replication
from hetero_async.core.state import State
from hetero_async.errors import Deposed, WitnessAway
from hetero_async.ports import Observer, Witness

# Tells all other nodes of a term (0: only asks), and says where each stands; None: it cannot be reached.
Ask = Callable[[int], Awaitable[Mapping[str, Position | None]]]
# So many times within a lease the witness is told that we are alive.
RENEWALS_PER_LEASE = 4
LOOKOUT_SECONDS = 5.0


async def begin(witness: Witness, name: str, state: State, lease_seconds: float, observer: Observer) -> Reign:
    """Take the lease for the log's own term, or for the one that the witness had already given us.

    Waits while the witness is away or another's lease runs, and says so. Raises Deposed when another reigns.
    """
    told = ""
    while True:
        why = "the witness cannot be reached"
        try:
            sighting = await witness.look()
            before = sighting.reign
            after = _reign_for(name, state, before)
            if await witness.claim(before, after):
                return after
            why = f"{sighting.holder or 'another server'} holds the lease still"
        except WitnessAway as error:
            why = str(error)
        if why != told:
            observer.event("waiting to serve", reason=why)
            told = why
        await trio.sleep(lease_seconds / RENEWALS_PER_LEASE)


def _reign_for(name: str, state: State, before: Reign | None) -> Reign:
    """What a server with this log may claim. Raises Deposed."""
    if before is None or (before.term < state.term and state.server == name):
        return Reign(term=state.term, server=name)
    if before.server == name and before.term >= state.term:
        return before
    raise Deposed(
        f"{before.server} reigns in term {before.term}, and this log ends in term {state.term}: "
        f"start this one as a standby (hetero-async standby --name {name})"
    )


class Keeper:
    def __init__(
        self,
        *,
        witness: Witness,
        reign: Reign,
        lease_seconds: float,
        replication: Replication,
        observer: Observer,
        tell: Callable[[Witnessed], Awaitable[None]],
    ) -> None:
        """`tell` passes what the witness says of who reigns to the machine; of the partner, `replication` is told."""
        self._witness = witness
        self._reign = reign
        self._mine = (reign.term, reign.server)
        self._lease_seconds = lease_seconds
        self._replication = replication
        self._observer = observer
        self._tell = tell
        self._is_unsure = False  # what is on record: an answer did not come
        self._sure_until = 0.0
        self._was_away = False
        self._count(reign.partner)

    async def run(self) -> None:
        """Until cancelled; then the lease is given back, so that nobody has to wait for its end."""
        try:
            while True:
                try:
                    await self._keep()
                    self._note(away="")
                except WitnessAway as error:
                    self._is_unsure = True
                    self._note(away=str(error))
                await self._say()
                await trio.sleep(self._lease_seconds / RENEWALS_PER_LEASE)
        finally:
            with trio.move_on_after(self._lease_seconds, shield=True):
                await self._resign()

    async def _keep(self) -> None:
        began = trio.current_time()
        if self._is_unsure:
            self._reign = (await self._witness.look()).reign or self._reign
            self._is_unsure = False
            self._count(self._reign.partner)
        if (self._reign.term, self._reign.server) != self._mine:
            return  # another reigns: the machine hears of it
        if await self._witness.renew() or await self._witness.claim(self._reign, self._reign):
            self._sure_until = began + self._lease_seconds
        else:
            self._is_unsure = True
        self._count(None)
        if self._is_unsure or (partner := self._replication.wanted_partner(_ms(trio.current_time()))) is None:
            return
        self._is_unsure = True  # until the answer is here
        after = replace(self._reign, partner=partner)
        if await self._witness.amend(self._reign, after):
            self._observer.event("partner", standby=partner or "none")
            self._reign, self._is_unsure = after, False
            self._count(partner)

    def _count(self, partner: str | None) -> None:
        """Not by way of the machine's inbox: what waits there was true before the last change was asked for."""
        if (self._reign.term, self._reign.server) == self._mine:
            self._replication.witnessed(partner, _ms(self._sure_until))

    async def _say(self) -> None:
        await self._tell(Witnessed(now_ms=_ms(trio.current_time()), reign=self._reign))

    async def _resign(self) -> None:
        try:
            await self._witness.resign()
        except WitnessAway:
            return  # the lease runs out by itself

    def _note(self, away: str) -> None:
        if bool(away) != self._was_away:
            self._observer.event("witness away" if away else "witness reached", **({"reason": away} if away else {}))
        self._was_away = bool(away)


class Lookout:
    """Without a witness: asks the other nodes now and then whether one of them follows, or serves in, a later term."""

    def __init__(self, *, ask: Ask, term: int, tell: Callable[[Followed], Awaitable[None]]) -> None:
        self._ask = ask
        self._term = term
        self._tell = tell

    async def run(self) -> None:
        while True:
            await trio.sleep(LOOKOUT_SECONDS)
            for node, position in (await self._ask(0)).items():
                if position is not None and position.term > self._term:
                    redirect = Redirect(server=node, term=position.term)
                    await self._tell(Followed(now_ms=_ms(trio.current_time()), standby=node, message=redirect))


def _ms(seconds: float) -> int:
    return int(seconds * 1000)
