"""Who reigns, as etcd remembers it: the transactions on two keys, whatever becomes of their answers.

assembly.py opens it for a server or a standby; core/ decides what to do with what it says. One key holds the reign and
stays. The other holds the server's name under a lease of etcd's, and goes when that has run out. Every transaction
names the revisions it was decided on, so that one which comes late changes nothing that was written after it.

After a transaction whose answer did not come, the next question settles it first: either it has happened, or
something is done that lets it never happen. So what `look` then says is final.
"""

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from json import dumps
from typing import TypeVar

import httpx2
import trio
from pydantic import TypeAdapter, ValidationError

from hetero_async.core.reign import Reign, Sighting
from hetero_async.errors import ConfigError, WitnessAway
from hetero_async.ports import Witness
from hetero_async.shell.etcd import EtcdMember, Member, Put, Value

T = TypeVar("T")

# Of the lease: so long a question may take with all members together. A renewal that fails leaves time for another;
# everything else may take longer, but not so long that the lease it has taken is nearly over.
RENEWAL_SHARE, QUESTION_SHARE = 1 / 3, 2 / 3

REIGN: TypeAdapter[Reign] = TypeAdapter(Reign)


def reign_key(run: str) -> str:
    """Which of etcd's keys holds the reign."""
    return f"hetero-async/{run}/reign"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """Both keys as they are at one moment."""

    reign: Value
    holder: Value
    term: int  # etcd's own


@dataclass(frozen=True, slots=True)
class Unsettled:
    """A transaction of which nobody knows whether it has happened, or will. `lease`: that it was to take, if any."""

    lease: int = 0


@asynccontextmanager
async def open_witness(urls: Sequence[str], run: str, lease_seconds: float) -> AsyncIterator[Witness]:
    """The witness of a run, over these members of one cluster. Leaving does not resign."""
    headers = {"accept-encoding": "identity"}  # bounds hold for what is read, with nothing to unpack
    # Each question is bounded as a whole. Proxies that a shell was told of are for other traffic.
    async with httpx2.AsyncClient(timeout=None, trust_env=False, headers=headers) as client:
        yield EtcdWitness([EtcdMember(url, client) for url in urls], run, lease_seconds)


class EtcdWitness:
    """Fulfils ports.Witness. Each method is answered or raises WitnessAway within its share of `lease_seconds`.

    Raises ConfigError when something else has been written in the reign's place.
    """

    def __init__(self, members: Sequence[Member], run: str, lease_seconds: float) -> None:
        assert members, "no member of the cluster is given"
        self._members = list(members)  # whichever answered last is asked first
        self._reign_key = reign_key(run)
        self._holder_key = f"hetero-async/{run}/holder"
        self._lease_seconds = lease_seconds
        self._lease = 0  # the one that we hold; 0: none
        self._unsettled: Unsettled | None = None
        self._turn = trio.Lock()  # of whoever writes

    async def look(self) -> Sighting:
        """What is in force now."""

        async def talk(member: Member) -> Sighting:
            async with self._turn:
                await self._settle(member)
            sight = await self._sight(member)
            return Sighting(reign=self._reign(sight), holder=_name(sight))

        return await self._ask(talk)

    async def claim(self, before: Reign | None, after: Reign) -> bool:
        """Take the reign and the lease, both or neither."""
        granted: list[int] = []

        async def talk(member: Member) -> bool:
            async with self._turn:
                await self._settle(member)
                return await self._claim(member, before, after, granted)

        return await self._ask(talk)

    async def amend(self, before: Reign, after: Reign) -> bool:
        """Change the reign and nothing else."""
        has_tried = False

        async def talk(member: Member) -> bool:
            nonlocal has_tried
            async with self._turn:
                await self._settle(member)
                while self._reign(sight := await self._sight(member)) == before:
                    has_tried = True
                    if await self._commit(member, {self._reign_key: sight.reign.revision}, self._puts(after)):
                        return True
                return has_tried and self._reign(sight) == after  # by the member that was asked before

        return await self._ask(talk)

    async def renew(self) -> bool:
        """Prolong the lease."""
        lease = self._lease

        async def talk(member: Member) -> bool:
            while True:
                kept = await member.keep_alive(lease)
                sight = await self._sight(member)
                # A leader that is cut off renews leases and does not know that it has been replaced, which etcd before
                # 3.4.25 does not check. It cannot have been replaced if a majority still stands by its term.
                if kept.term == sight.term:
                    return kept.seconds > 0 and sight.holder.lease == lease

        return lease != 0 and await self._ask(talk, RENEWAL_SHARE)

    async def resign(self) -> None:
        """Give the lease back."""
        leases = [self._lease, self._unsettled.lease if self._unsettled else 0]

        async def talk(member: Member) -> None:
            for lease in leases:
                if lease:
                    await member.revoke(lease)

        await self._ask(talk)
        self._lease = 0

    # --- one conversation, at one member ---

    async def _claim(self, member: Member, before: Reign | None, after: Reign, granted: list[int]) -> bool:
        """`granted`: leases that this claim has asked for, at any member."""
        while True:
            sight = await self._sight(member)
            if sight.holder.lease in granted:  # the member that was asked before has done it
                return True
            if self._reign(sight) != before or _name(sight) not in ("", after.server):
                return False
            lease = await member.grant(math.ceil(self._lease_seconds))  # etcd counts whole ones
            granted.append(lease)
            expected = {self._reign_key: sight.reign.revision, self._holder_key: sight.holder.revision}
            holder = Put(key=self._holder_key, content=after.server.encode(), lease=lease)
            if await self._commit(member, expected, [*self._puts(after), holder], lease):
                self._lease = lease
                return True
            await member.revoke(lease)

    async def _commit(self, member: Member, expected: dict[str, int], puts: Sequence[Put], lease: int = 0) -> bool:
        self._unsettled = Unsettled(lease)
        is_done = await member.write(expected, puts)
        self._unsettled = None
        return is_done

    async def _settle(self, member: Member) -> None:
        """Find out what became of a transaction without an answer; if it has not happened, it never will."""
        if self._unsettled is None:
            return
        lease, sight = self._unsettled.lease, await self._sight(member)
        if not lease or sight.holder.lease != lease:
            if sight.reign.revision:
                # Writing what is there already makes it a newer revision, which the late one does not expect. When
                # this fails somebody else has written, to the same effect.
                await member.write({self._reign_key: sight.reign.revision}, [self._as_it_is(sight)])
            else:
                await member.revoke(lease)  # the first claim of all; a transaction on a lease that is gone is refused
            sight = await self._sight(member)
        if lease and sight.holder.lease == lease:
            self._lease = lease
        self._unsettled = None

    async def _sight(self, member: Member) -> Sight:
        reading = await member.read([self._reign_key, self._holder_key])
        values = reading.values
        return Sight(reign=values[self._reign_key], holder=values[self._holder_key], term=reading.term)

    async def _ask(self, talk: Callable[[Member], Awaitable[T]], lease_share: float = QUESTION_SHARE) -> T:
        """Until one member has answered everything: each in turn has half of the time that is left, the last all."""
        ends_at = trio.current_time() + lease_share * self._lease_seconds
        order, failures = tuple(self._members), list[str]()
        for member in order:
            left = max(ends_at - trio.current_time(), 0.0)
            seconds = left if member is order[-1] else left / 2
            try:
                with trio.fail_after(seconds):
                    return await talk(member)
            except trio.TooSlowError:
                failures.append(f"{member.name}: no answer within {seconds:.2g} s")
            except WitnessAway as error:
                failures.append(str(error))
            if self._members[0] is member:
                self._members.append(self._members.pop(0))
        raise WitnessAway(f"no witness: {'; '.join(failures)}")

    # --- what the keys hold ---

    def _puts(self, reign: Reign) -> list[Put]:
        return [Put(key=self._reign_key, content=dumps(asdict(reign), ensure_ascii=False).encode())]

    def _as_it_is(self, sight: Sight) -> Put:
        return Put(key=self._reign_key, content=sight.reign.content)

    def _reign(self, sight: Sight) -> Reign | None:
        if not sight.reign.revision:
            return None
        try:
            return REIGN.validate_json(sight.reign.content, strict=True)
        except ValidationError as error:
            raise ConfigError(
                f"etcd's key {self._reign_key} holds something that is not a reign; stop all servers, delete it "
                f"(etcdctl del {self._reign_key}), then start the server with the newest log first"
            ) from error


def _name(sight: Sight) -> str:
    """Of the server that holds the lease."""
    return sight.holder.content.decode(errors="replace")
