"""The witness over a real etcd cluster: members that die and freeze, and HTTP that fails on the way."""

import base64
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import httpx2
import pytest
import trio
from etcd_local import MEMBERS, LocalCluster
from shell.faulty_front import (
    Exchange,
    Front,
    Held,
    Treatment,
    answered,
    endless,
    open_front,
    passed_on,
    reset,
    slowly,
    torn,
    unanswered,
)
from shell.place import moment, run

from hetero_async.core.reign import Reign, Sighting
from hetero_async.errors import ConfigError, WitnessAway
from hetero_async.shell.witness import EtcdWitness, open_witness

T = TypeVar("T")

LEASE_SECONDS = 2.0
A1, A1_WITH_B = Reign(term=1, server="a"), Reign(term=1, server="a", partner="b")
B2, C2 = Reign(term=2, server="b"), Reign(term=2, server="c")
ROUNDS = 20
RUNS = (f"run-{number}" for number in itertools.count())


@asynccontextmanager
async def of(name: str, *urls: str, lease_seconds: float = LEASE_SECONDS) -> AsyncIterator[EtcdWitness]:
    async with open_witness(urls, name, lease_seconds) as witness:
        yield witness


async def insist(question: Callable[[], Awaitable[T]]) -> T:
    """Ask until there is an answer."""
    while True:
        try:
            return await question()
        except WitnessAway:
            await moment()


async def claim_again(a: EtcdWitness) -> None:
    """From whatever has come of what was not answered."""
    sighting = await insist(a.look)
    assert sighting.holder in ("", "a")
    assert await insist(lambda: a.claim(sighting.reign, A1))


async def told(question: Awaitable[object]) -> str:
    """Why there is no answer; and that this comes before the lease can have run out."""
    with trio.fail_after(LEASE_SECONDS), pytest.raises(WitnessAway) as caught:
        await question
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_who_claims_the_reign_has_it_and_nobody_else_gets_it(etcd: LocalCluster) -> None:
    async def main() -> None:
        name = next(RUNS)
        async with of(name, *etcd.urls) as a, of(name, *etcd.urls) as b:
            assert await a.look() == Sighting(reign=None)
            assert await a.claim(None, A1)
            assert await b.look() == await a.look() == Sighting(reign=A1, holder="a")
            assert await a.renew()
            assert not await b.claim(None, Reign(term=1, server="b")), "there is a reign"
            assert not await b.claim(A1, B2), "a holds the lease"
            assert not await b.renew()
            assert await b.look() == Sighting(reign=A1, holder="a")
        async with of(next(RUNS), *etcd.urls) as other:
            assert await other.look() == Sighting(reign=None), "another run's reign is its own"

    run(main)


def test_a_lease_is_held_for_as_long_as_it_is_renewed_and_then_the_next_takes_over(etcd: LocalCluster) -> None:
    async def main() -> None:
        name, lease_seconds = next(RUNS), 1.0
        async with of(name, *etcd.urls, lease_seconds=lease_seconds) as a, of(name, *etcd.urls) as b:
            assert await a.claim(None, A1)
            ends_at = trio.current_time() + 2 * lease_seconds
            while trio.current_time() < ends_at:
                assert await insist(a.renew)
                assert not await insist(lambda: b.claim(A1, B2))
                await trio.sleep(lease_seconds / 5)
            while (await b.look()).holder:
                await moment()
            assert await b.look() == Sighting(reign=A1), "the reign stays, though nobody serves"
            assert not await a.renew()
            assert await b.claim(A1, B2)
            assert not await a.renew()
            assert not await a.claim(A1, A1)
            assert not await a.amend(A1, A1_WITH_B)
            assert await a.look() == Sighting(reign=B2, holder="b")

    run(main)


def test_of_two_that_claim_at_once_exactly_one_wins(etcd: LocalCluster) -> None:
    async def main() -> None:
        name = next(RUNS)
        async with of(name, *etcd.urls) as b, of(name, *reversed(etcd.urls)) as c:
            before: Reign | None = None
            for term in range(1, ROUNDS + 1):
                won: dict[str, bool] = {}

                async def claim(witness: EtcdWitness, server: str, before: Reign | None, term: int) -> None:
                    won[server] = await witness.claim(before, Reign(term=term, server=server))  # noqa: B023

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(claim, b, "b", before, term)
                    nursery.start_soon(claim, c, "c", before, term)
                assert sorted(won.values()) == [False, True], f"term {term}"
                winner = "b" if won["b"] else "c"
                before = Reign(term=term, server=winner)
                assert await b.look() == await c.look() == Sighting(reign=before, holder=winner)
                assert [await b.renew(), await c.renew()] == [won["b"], won["c"]]
                await (b if won["b"] else c).resign()

    run(main)


def test_a_server_that_starts_again_takes_its_own_lease_over_at_once(etcd: LocalCluster) -> None:
    async def main() -> None:
        name, lease_seconds = next(RUNS), 1.0
        async with of(name, *etcd.urls, lease_seconds=lease_seconds) as earlier:
            assert await earlier.claim(None, A1)
            async with of(name, *etcd.urls, lease_seconds=lease_seconds) as later:
                assert await later.claim(A1, A1)
                assert not await earlier.renew(), "the earlier life is over"
                ends_at = trio.current_time() + 2 * lease_seconds  # its lease ends as well, and takes nothing with it
                while trio.current_time() < ends_at:
                    assert await insist(later.renew)
                    await trio.sleep(lease_seconds / 5)
                assert await later.look() == Sighting(reign=A1, holder="a")

    run(main)


def test_amending_changes_the_reign_only_from_what_it_was_seen_to_be(etcd: LocalCluster) -> None:
    async def main() -> None:
        async with of(next(RUNS), *etcd.urls) as a:
            assert not await a.amend(A1, A1_WITH_B), "there is none yet"
            assert await a.claim(None, A1)
            assert await a.amend(A1, A1_WITH_B)
            assert not await a.amend(A1, A1_WITH_B)
            assert await a.look() == Sighting(reign=A1_WITH_B, holder="a")
            assert await a.renew()

    run(main)


def test_who_resigns_keeps_nobody_waiting(etcd: LocalCluster) -> None:
    async def main() -> None:
        name = next(RUNS)
        async with of(name, *etcd.urls, lease_seconds=60) as a, of(name, *etcd.urls) as b:
            assert await a.claim(None, A1)
            await a.resign()
            assert await b.look() == Sighting(reign=A1)
            assert not await a.renew()
            assert await b.claim(A1, B2)
            await a.resign()  # of what it has given back already
            assert await b.renew()

    run(main)


def test_one_member_that_dies_or_freezes_is_passed_over(etcd: LocalCluster) -> None:
    async def main() -> None:
        follower = (etcd.leader() + 1) % MEMBERS
        async with of(next(RUNS), etcd.urls[follower], *etcd.urls) as a:
            etcd.freeze(follower)
            assert await a.claim(None, A1)
            etcd.thaw(follower)
            etcd.kill(follower)
            assert await a.amend(A1, A1_WITH_B)
            etcd.restore()
            etcd.kill(etcd.leader())
            await insist(a.renew)
            assert await a.look() == Sighting(reign=A1_WITH_B, holder="a")

    run(main)


def test_without_a_majority_there_is_no_answer_and_with_one_there_is_again(etcd: LocalCluster) -> None:
    async def main() -> None:
        leader = etcd.leader()
        others = [member for member in range(MEMBERS) if member != leader]
        async with of(next(RUNS), *etcd.urls, lease_seconds=1.0) as a, of(next(RUNS), etcd.urls[leader]) as b:
            assert await a.claim(None, A1)
            assert await b.claim(None, A1)
            etcd.freeze(*others)
            assert "no answer" in await told(b.renew()), "its leader does not know yet that it leads nobody"
            reason = await told(a.look())
            assert all(url in reason for url in etcd.urls)
            await told(a.amend(A1, A1_WITH_B))
            etcd.thaw(*others)
            await claim_again(a)
            etcd.kill(*others)
            await told(a.claim(A1, A1))
            await told(a.renew())
            etcd.restore()
            await claim_again(a)
            assert await a.look() == Sighting(reign=A1, holder="a")

    run(main)


FAULTS: dict[str, tuple[Treatment, str]] = {
    "409": (answered(409, b'{"error":"conflict","code":10}'), "409 conflict"),
    "412": (answered(412, b""), "412"),
    "500": (answered(500, b"<html>oh\nno</html>"), "500"),
    "503": (answered(503, b'{"error":"etcdserver: no leader","code":14}'), "503 etcdserver: no leader"),
    "307": (answered(307, b""), "307"),
    "garbage": (answered(200, b"\xff\x00{"), "not that of an etcd server"),
    "deep garbage": (answered(200, b"[" * 60_000), "not that of an etcd server"),
    "empty": (answered(200, b"{}"), "not that of an etcd server"),
    "oversized": (answered(200, b" " * 65_537), "longer than 65536 bytes"),
    "endless": (endless, "longer than 65536 bytes"),
    "time-out": (unanswered, "no answer within"),
    "slow body": (slowly, "no answer within"),
    "torn": (torn, ""),
    "reset": (reset, ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_68_whatever_goes_wrong_on_the_way_nothing_is_taken_for_an_answer(etcd: LocalCluster, fault: str) -> None:
    treatment, reason = FAULTS[fault]

    async def main() -> None:
        async with open_front(etcd.urls[0]) as front, of(next(RUNS), front.url, lease_seconds=1.0) as a:
            front.treat_writes(treatment)
            assert reason in await told(a.claim(None, A1))
            front.treatment = passed_on
            has_happened = fault in ("slow body", "torn", "reset")
            assert await a.look() == (Sighting(reign=A1, holder="a") if has_happened else Sighting(reign=None))
            assert await a.renew() == has_happened
            if not has_happened:
                assert await a.claim(None, A1)
            for question in (a.look, a.renew, lambda: a.amend(A1, A1_WITH_B), a.resign):
                front.treatment = treatment
                assert reason in await told(question())
                front.treatment = passed_on
            assert (await a.look()).reign in (A1, A1_WITH_B)

    run(main)


def test_a_transaction_whose_answer_is_lost_is_done_once_when_the_next_member_is_asked(etcd: LocalCluster) -> None:
    async def main() -> None:
        name = next(RUNS)
        async with open_front(etcd.urls[0]) as front, of(name, front.url, etcd.urls[1]) as a:
            for treatment in (reset, answered(503, b"")):
                front.treat_writes(treatment)
                before = (await a.look()).reign
                after = Reign(term=before.term + 1 if before else 1, server="a")
                async with of(name, front.url, etcd.urls[1]) as fresh:
                    assert await fresh.claim(before, after)
                    assert await fresh.renew()
                async with of(name, front.url, etcd.urls[1]) as fresh:
                    amended = Reign(term=after.term, server="a", partner="b")
                    assert await fresh.amend(after, amended)
                    assert await fresh.look() == Sighting(reign=amended, holder="a")

    run(main)


def test_after_a_look_no_earlier_transaction_takes_effect_however_late_it_comes(etcd: LocalCluster) -> None:
    async def held(front: Front, question: Callable[[], Awaitable[object]]) -> Held:
        treatment = Held()
        front.treat_writes(treatment)
        await told(question())
        front.treatment = passed_on
        return treatment

    async def let_in(treatment: Held) -> None:
        treatment.let_in.set()
        await treatment.answered.wait()

    async def main() -> None:
        async with open_front(etcd.urls[0]) as front, of(next(RUNS), front.url, lease_seconds=1.0) as a:
            late = await held(front, lambda: a.claim(None, A1))
            assert await a.look() == Sighting(reign=None)
            await let_in(late)
            assert await a.look() == Sighting(reign=None)
            assert await a.claim(None, A1)
            late = await held(front, lambda: a.amend(A1, A1_WITH_B))
            assert (await a.look()).reign == A1
            await let_in(late)
            assert (await a.look()).reign == A1
            late = await held(front, lambda: a.amend(A1, A1_WITH_B))
            await let_in(late)
            assert (await a.look()).reign == A1_WITH_B, "it came before the look"

    run(main)


def test_a_lease_that_was_renewed_by_a_deposed_leader_is_renewed_again(etcd: LocalCluster) -> None:
    async def by_an_earlier_leader(exchange: Exchange) -> None:
        status, body = await exchange.forward()
        answer = json.loads(body)
        if "result" in answer:
            answer["result"]["header"]["raft_term"] = "1"
        await exchange.answer(status, json.dumps(answer).encode())

    async def main() -> None:
        async with open_front(etcd.urls[0]) as front, of(next(RUNS), front.url) as a:
            assert await a.claim(None, A1)
            front.treatment = by_an_earlier_leader
            await told(a.renew())
            assert front.paths.count("/v3/lease/keepalive") > 1
            front.treatment = passed_on
            assert await a.renew()

    run(main)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"[]", b'{"term":"1","server":"a"}', b'{"term":1}'])
def test_what_is_not_a_reign_is_reported_with_its_key(etcd: LocalCluster, content: bytes) -> None:
    async def main() -> None:
        name = next(RUNS)
        key = f"hetero-async/{name}/reign"
        encoded = {"key": base64.b64encode(key.encode()).decode(), "value": base64.b64encode(content).decode()}
        httpx2.post(f"{etcd.urls[0]}/v3/kv/put", json=encoded, trust_env=False)
        async with of(name, *etcd.urls) as a:
            with pytest.raises(ConfigError, match=f"etcdctl del {key}"):
                await a.look()
            with pytest.raises(ConfigError, match="not a reign"):
                await a.claim(None, A1)

    run(main)


def test_proxies_of_the_environment_are_not_asked(etcd: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")

    async def main() -> None:
        async with of(next(RUNS), *etcd.urls) as a:
            assert await a.claim(None, A1)

    run(main)
