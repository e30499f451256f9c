"""The simulated witness: the real one's code over simulated keys and leases, and a network that loses its answers."""

from collections.abc import Awaitable, Callable
from random import Random

import pytest
import trio
import trio.testing

from hetero_async.core.reign import Reign, Sighting
from hetero_async.errors import WitnessAway
from hetero_async.shell.witness import EtcdWitness
from hetero_async.sim.network import Condition, Network
from hetero_async.sim.process import Killed, Process
from hetero_async.sim.trace import Trace
from hetero_async.sim.witness import SimulatedWitness

LEASE_SECONDS = 3.0
DELAY = 0.1
WITNESS, SITE_A, SITE_B = "witness", "site-a", "site-b"
A1, A1_WITH_B = Reign(term=1, server="a"), Reign(term=1, server="a", partner="b")
B2 = Reign(term=2, server="b")


class Place:
    def __init__(self) -> None:
        self.network = Network(Random("witness"), Trace(None))
        for site in (SITE_A, SITE_B):
            self.network.join(site, WITNESS, Condition(delay=DELAY))
        self.witness = SimulatedWitness(self.network, WITNESS, LEASE_SECONDS)
        self.process_a, self.process_b = Process("a", SITE_A), Process("b", SITE_B)
        self.a, self.b = self.witness.seen_from(self.process_a), self.witness.seen_from(self.process_b)


def play(script: Callable[[Place], Awaitable[None]]) -> None:
    async def main() -> None:
        place = Place()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(place.network.run)
            with trio.fail_after(1000):
                await script(place)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


async def renewing(witness: EtcdWitness, seconds: float) -> None:
    ends_at = trio.current_time() + seconds
    while trio.current_time() < ends_at:
        assert await witness.renew()
        await trio.sleep(LEASE_SECONDS / 3)


def test_a_lease_lasts_while_it_is_renewed_and_ends_in_virtual_time() -> None:
    async def script(place: Place) -> None:
        assert await place.a.look() == Sighting(reign=None)
        assert await place.a.claim(None, A1)
        await renewing(place.a, 10 * LEASE_SECONDS)
        assert not await place.b.claim(A1, B2)
        await trio.sleep(LEASE_SECONDS)
        assert not await place.a.renew()
        assert await place.b.look() == Sighting(reign=A1)
        assert await place.b.claim(A1, B2)
        assert not await place.a.claim(A1, A1)
        assert await place.a.look() == Sighting(reign=B2, holder="b")
        await place.b.resign()
        assert await place.a.look() == Sighting(reign=B2)

    play(script)


def test_a_question_takes_the_way_there_and_back() -> None:
    async def script(place: Place) -> None:
        began = trio.current_time()
        await place.a.look()
        assert trio.current_time() - began == pytest.approx(2 * DELAY)

    play(script)


def test_of_two_that_claim_at_once_one_wins() -> None:
    async def script(place: Place) -> None:
        won: list[bool] = []

        async def claim(witness: EtcdWitness, reign: Reign) -> None:
            won.append(await witness.claim(None, reign))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(claim, place.a, A1)
            nursery.start_soon(claim, place.b, Reign(term=1, server="b"))
        assert sorted(won) == [False, True]

    play(script)


@pytest.mark.parametrize("way", [(SITE_A, WITNESS), (WITNESS, SITE_A)])
def test_across_a_cut_nothing_is_known_in_time_and_a_look_afterwards_tells(way: tuple[str, str]) -> None:
    async def script(place: Place) -> None:
        place.network.cut(*way)
        began = trio.current_time()
        for question in (place.a.look, lambda: place.a.claim(None, A1)):
            with pytest.raises(WitnessAway):
                await question()
        assert trio.current_time() - began < 2 * LEASE_SECONDS
        place.network.mend(*way)
        assert await place.a.look() == Sighting(reign=None)
        assert await place.a.claim(None, A1)
        await renewing(place.a, LEASE_SECONDS)

    play(script)


async def cut_when_written(place: Place) -> None:
    """Between the writing and its answer."""
    revision = place.witness.etcd.revision
    while place.witness.etcd.revision == revision:  # noqa: ASYNC110, there is no event for a look from outside
        await trio.sleep(DELAY / 10)
    place.network.cut(WITNESS, SITE_A)


def test_a_claim_whose_answer_is_lost_has_happened_and_holds() -> None:
    async def script(place: Place) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cut_when_written, place)
            with pytest.raises(WitnessAway):
                await place.a.claim(None, A1)
        assert (await place.b.look()).reign == A1
        place.network.mend(WITNESS, SITE_A)
        assert await place.a.look() == Sighting(reign=A1, holder="a")
        assert await place.a.renew()

    play(script)


def test_an_amendment_that_comes_after_a_look_changes_nothing_any_more() -> None:
    async def script(place: Place) -> None:
        assert await place.a.claim(None, A1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(slow_from, place, 1.9 * DELAY)  # it has read by then, and not written
            with trio.move_on_after(2.5 * DELAY):
                await place.a.amend(A1, A1_WITH_B)
        place.network.join(SITE_A, WITNESS, Condition(delay=DELAY))
        assert (await place.a.look()).reign == A1
        await trio.sleep(20 * DELAY)
        assert (await place.a.look()).reign == A1
        with trio.move_on_after(2.5 * DELAY):
            await place.a.amend(A1, A1_WITH_B)
        assert (await place.a.look()).reign == A1_WITH_B, "it has come before the look"

    play(script)


async def slow_from(place: Place, seconds: float) -> None:
    await trio.sleep(seconds)
    place.network.join(SITE_A, WITNESS, Condition(delay=10 * DELAY))


def test_what_a_dead_server_had_asked_for_may_still_happen_and_a_frozen_one_hears_nothing() -> None:
    async def script(place: Place) -> None:
        async def dies() -> None:
            with place.process_a.scope:
                await place.a.claim(None, A1)
            assert place.process_a.is_dead

        async with trio.open_nursery() as nursery:
            nursery.start_soon(dies)
            await trio.sleep(4.5 * DELAY)  # it has looked and has a lease; the transaction is under way
            place.process_a.kill()
        await trio.sleep(DELAY)
        assert await place.b.look() == Sighting(reign=A1, holder="a")
        with pytest.raises(Killed):
            await place.a.look()
        place.process_b.freeze()
        with pytest.raises(WitnessAway):
            await place.b.look()
        place.process_b.thaw()
        assert (await place.b.look()).reign == A1

    play(script)
