"""The simulated witness: the real one's code over simulated keys and leases, and a network that loses its answers."""

import contextlib
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any, TypeVar

import pytest
import trio
import trio.testing

from hetero_async.core.reign import Reign, Sighting
from hetero_async.errors import WitnessAway
from hetero_async.ports import Witness
from hetero_async.sim.network import Condition, Network
from hetero_async.sim.process import Killed, Process
from hetero_async.sim.trace import Trace
from hetero_async.sim.witness import SimulatedWitness

LEASE_SECONDS = 3.0
DELAY = 0.1
WITNESS, SITE_A, SITE_B = "witness", "site-a", "site-b"
A1, A1_WITH_B = Reign(term=1, server="a"), Reign(term=1, server="a", partner="b")
B2 = Reign(term=2, server="b")


T = TypeVar("T")

GOOD = Condition(delay=DELAY)
# Now and then something is lost on the way, and what is asked at once comes in any order.
BAD = Condition(delay=0.02, jitter=0.6, loss=0.05)


class Place:
    def __init__(self, seed: int = 0, condition: Condition = GOOD) -> None:
        self.random = Random(f"witness {seed}")
        self.network = Network(self.random, Trace(None))
        for site in (SITE_A, SITE_B):
            self.network.join(site, WITNESS, condition)
        self.witness = SimulatedWitness(self.network, WITNESS, LEASE_SECONDS)
        self.process_a, self.process_b = Process("a", SITE_A), Process("b", SITE_B)
        self.a, self.b = self.witness.seen_from(self.process_a), self.witness.seen_from(self.process_b)


def play(script: Callable[[Place], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        place = Place(**options)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(place.network.run)
            with trio.fail_after(1000):
                await script(place)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


async def renewing(witness: Witness, seconds: float) -> None:
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

        async def claim(witness: Witness, reign: Reign) -> None:
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


async def insist(question: Callable[[], Awaitable[T]]) -> T:
    while True:
        try:
            return await question()
        except WitnessAway:
            await trio.sleep(DELAY)


@pytest.mark.parametrize("seed", range(10))
def test_what_a_look_has_shown_stays_so_until_somebody_changes_it(seed: int) -> None:
    async def script(place: Place) -> None:
        assert await place.b.claim(None, B2)
        reign, other = B2, Reign(term=2, server="b", partner="a")
        for _ in range(40):
            place.network.join(SITE_B, WITNESS, Condition(delay=place.random.uniform(0, LEASE_SECONDS / 2)))
            with contextlib.suppress(WitnessAway):
                await place.b.amend(reign, other)
            place.network.join(SITE_B, WITNESS, GOOD)
            seen = (await place.b.look()).reign
            await trio.sleep(LEASE_SECONDS)
            assert (await place.b.look()).reign == seen
            assert seen in (reign, other)
            if seen == other:
                reign, other = other, reign

    play(script, seed=seed)


@pytest.mark.parametrize("seed", range(10))
def test_no_two_ever_believe_to_reign_in_one_term(seed: int) -> None:
    reigned: dict[int, str] = {}

    async def contend(witness: Witness, name: str, place: Place) -> None:
        for _ in range(30):
            sighting = await insist(witness.look)
            if sighting.holder in ("", name):
                before = sighting.reign
                term = before.term + 1 if before else 1
                with contextlib.suppress(WitnessAway):
                    if await witness.claim(before, Reign(term=term, server=name)):
                        assert reigned.setdefault(term, name) == name
                        await trio.sleep(place.random.uniform(0, LEASE_SECONDS))
            if sighting.reign is not None and sighting.reign.server == name:
                assert reigned.setdefault(sighting.reign.term, name) == name
            await trio.sleep(place.random.uniform(0, LEASE_SECONDS))

    async def script(place: Place) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(contend, place.a, "a", place)
            nursery.start_soon(contend, place.b, "b", place)

    play(script, seed=seed, condition=BAD)
    assert set(reigned.values()) == {"a", "b"}, "each had its turn"
