"""A simulated etcd cluster, for the real witness code to ask: keys, revisions and leases in virtual time.

All nodes of a world share one Etcd, at a site of its own. Each asks through a member of its own, as shell/witness.py
asks over HTTP; question and answer travel under the network's conditions. So a question may come late, or after
whoever asked has died, and an answer may be lost when what was asked has been done.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import trio

from hetero_async.core.reign import Reign
from hetero_async.errors import WitnessAway
from hetero_async.ports import Witness
from hetero_async.shell.etcd import Kept, Put, Reading, Value
from hetero_async.shell.witness import REIGN, EtcdWitness, reign_key
from hetero_async.sim.network import Network
from hetero_async.sim.process import Process

T = TypeVar("T")

RUN = "simulated"


@dataclass(slots=True)
class Lease:
    seconds: int
    ends_at: float


class Etcd:
    """What the cluster has agreed on. Each method is one moment."""

    term = 1

    def __init__(self) -> None:
        self.revision = 0
        self._values: dict[str, Value] = {}
        self._leases: dict[int, Lease] = {}
        self._granted = 0

    def read(self, keys: Sequence[str]) -> Reading:
        self._expire()
        return Reading(values={key: self._values.get(key, Value()) for key in keys}, term=self.term)

    def write(self, expected: Mapping[str, int], puts: Sequence[Put]) -> bool:
        """Raises WitnessAway when a lease that is to be attached has ended: nothing is written then."""
        self._expire()
        if any(put.lease and put.lease not in self._leases for put in puts):
            raise WitnessAway("etcd: 404 etcdserver: requested lease not found")
        if any(self._values.get(key, Value()).revision != revision for key, revision in expected.items()):
            return False
        self.revision += 1
        for put in puts:
            self._values[put.key] = Value(content=put.content, revision=self.revision, lease=put.lease)
        return True

    def reign(self, run: str) -> Reign | None:
        """What it holds, for whoever looks on."""
        value = self._values.get(reign_key(run))
        return None if value is None else REIGN.validate_json(value.content)

    def grant(self, seconds: int) -> int:
        self._granted += 1
        self._leases[self._granted] = Lease(seconds, trio.current_time() + seconds)
        return self._granted

    def keep_alive(self, number: int) -> Kept:
        self._expire()
        if (lease := self._leases.get(number)) is None:
            return Kept(seconds=0, term=self.term)
        lease.ends_at = trio.current_time() + lease.seconds
        return Kept(seconds=lease.seconds, term=self.term)

    def revoke(self, number: int) -> None:
        if self._leases.pop(number, None) is not None:
            self.revision += 1
            self._values = {key: value for key, value in self._values.items() if value.lease != number}

    def _expire(self) -> None:
        for number, lease in list(self._leases.items()):
            if lease.ends_at <= trio.current_time():
                self.revoke(number)


class SimulatedMember:
    """Fulfils shell.etcd.Member for one process."""

    name = "etcd"

    def __init__(self, etcd: Etcd, network: Network, site: str, process: Process) -> None:
        self._etcd = etcd
        self._network = network
        self._site = site
        self._process = process

    async def read(self, keys: Sequence[str]) -> Reading:
        return await self._answer(lambda: self._etcd.read(keys))

    async def write(self, expected: Mapping[str, int], puts: Sequence[Put]) -> bool:
        return await self._answer(lambda: self._etcd.write(expected, puts))

    async def grant(self, seconds: int) -> int:
        return await self._answer(lambda: self._etcd.grant(seconds))

    async def keep_alive(self, lease: int) -> Kept:
        return await self._answer(lambda: self._etcd.keep_alive(lease))

    async def revoke(self, lease: int) -> None:
        await self._answer(lambda: self._etcd.revoke(lease))

    async def _answer(self, question: Callable[[], T]) -> T:
        """Wait for it for as long as it takes; whoever asks has a deadline."""
        await self._process.here()
        answers: list[T | WitnessAway] = []
        arrived = trio.Event()

        def ask() -> None:
            try:
                answers.append(question())
            except WitnessAway as error:
                answers.append(error)
            self._network.post(self._site, self._process.site, arrived.set)

        self._network.post(self._process.site, self._site, ask)
        await arrived.wait()
        await self._process.here()
        [answer] = answers
        if isinstance(answer, WitnessAway):
            raise answer
        return answer


class SimulatedWitness:
    """The witness of a world. `network.run` must run."""

    def __init__(self, network: Network, site: str, lease_seconds: float) -> None:
        self.etcd = Etcd()
        self._network = network
        self._site = site
        self._lease_seconds = lease_seconds

    def seen_from(self, process: Process) -> Witness:
        """For one life of a server."""
        member = SimulatedMember(self.etcd, self._network, self._site, process)
        return EtcdWitness([member], RUN, self._lease_seconds)
