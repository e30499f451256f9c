"""Peers with an admitted key that send what no worker should: refused with a reason, and nothing comes of it."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import trio
from sim.puppet import open_puppet
from sim.scenario import LEASE_SECONDS, PUPPET, ScriptedWorld, make_plan, positions, run, trained_in

from hetero_async.core.messages import Ack, Message, Nack, Refused, Rejoin
from hetero_async.core.records import Delta, Left
from hetero_async.quarantine import STRIKES_MAX
from hetero_async.sim.plan import WorkerPlan
from hetero_async.sim.workload import Regression, RegressionStudent

STALENESS = 2
# So many norms, and the gate knows what is usual.
NORMS = 16


def test_44_a_delta_offered_ten_times_is_applied_once_and_acknowledged_ten_times(tmp_path: Path) -> None:
    acks: list[Message] = []

    async def script(world: ScriptedWorld) -> None:
        async with open_puppet(world) as puppet:
            push, payload = puppet.delta(await puppet.lease(4))
            await puppet.push(push, payload)
            for _ in range(9):
                await puppet.push(push, payload)
            acks.extend(puppet.told(Ack))
            assert len(puppet.wanted) == 1, "its bytes are asked for once"

    world = run(make_plan(puppet=True), tmp_path, script)
    ((_, entry),) = world.records(Delta, PUPPET)
    assert len(acks) == 10
    assert {(ack.seq, ack.lsn) for ack in acks} == {(1, entry.lsn)}
    assert not world.answers(PUPPET, Nack)


def test_24_what_a_peer_had_begun_to_send_is_forgotten_when_it_is_given_up(tmp_path: Path) -> None:
    async def script(world: ScriptedWorld) -> None:
        async with open_puppet(world) as puppet:
            push, _ = puppet.delta(await puppet.lease(4))
            await puppet.say(push)
            await world.until(lambda: PUPPET in world.serving._bulk._uploads, "its bytes are asked for, and never come")
            puppet.incarnation = 0  # no more heartbeats
            await world.until(lambda: world.records(Left, PUPPET), "it is given up")
            await world.until(lambda: PUPPET not in world.serving._bulk._uploads, "its place is free")

    run(make_plan(puppet=True), tmp_path, script)


def test_46_a_replayed_delta_is_known_and_its_samples_cannot_be_claimed_again(tmp_path: Path) -> None:
    reasons: list[str] = []

    async def script(world: ScriptedWorld) -> None:
        async with open_puppet(world) as puppet:
            captured = puppet.delta(await puppet.lease(4))
            await puppet.push(*captured)
            newest = puppet.delta(await puppet.lease(4))
            newest_ack = await puppet.push(*newest)

            reasons.append(await puppet.refused(*captured))
            assert await puppet.push(*newest) == newest_ack
            reasons.append(await puppet.refused(*captured, seq=3))  # under a new number
            behind = world.state.version + STALENESS + 1
            await world.until(lambda: world.state.version > behind, "its anchor is too old")
            reasons.append(await puppet.refused(*captured, seq=3))
            await puppet.join()
            known = len(puppet.heard)
            await puppet.say(replace(captured[0], seq=3))  # of a life that is over: not a word
            await trio.sleep(2)
            assert not [heard for heard in puppet.heard[known:] if isinstance(heard, Ack | Nack)]

    world = run(make_plan(samples=400, puppet=True, max_staleness=STALENESS), tmp_path, script)
    captured, newest = world.deltas(PUPPET)
    first, last = captured.ranges[0]
    assert reasons[0] == "delta 1 comes after delta 2 was admitted"
    assert reasons[1] == f"positions {first}..{last - 1} are not leased to it"
    assert reasons[2].startswith("too stale: ")
    assert (captured.seq, newest.seq) == (1, 2)


def test_47_the_bound_is_exact_and_what_is_refused_is_leased_again(tmp_path: Path) -> None:
    reasons: list[str] = []

    async def script(world: ScriptedWorld) -> None:
        async with open_puppet(world) as puppet:
            held = await puppet.lease(4)
            (start, stop), *_ = held
            in_time, late = puppet.delta(((start, start + 2),)), puppet.delta(((start + 2, stop),))
            version = world.state.version
            await world.until(lambda: world.state.version == version + STALENESS, "the bound is reached")
            assert isinstance(await puppet.push(*in_time), Ack)
            await world.until(lambda: world.state.version == version + STALENESS + 1, "the bound is passed")
            reasons.append(await puppet.refused(*late))
            assert await puppet.lease(4) == ((start + 2, stop),)
            puppet.seq -= 1
            assert isinstance(await puppet.push(*puppet.delta(((start + 2, stop),))), Ack)

    world = run(make_plan(samples=300, puppet=True, max_staleness=STALENESS), tmp_path, script)
    assert reasons == [f"too stale: {STALENESS + 1} versions behind, {STALENESS} allowed"]
    assert [delta.seq for delta in world.deltas(PUPPET)] == [1, 2]


def test_47_a_worker_that_slept_beyond_the_bound_goes_on_from_the_newest_parameters(tmp_path: Path) -> None:
    async def script(world: ScriptedWorld) -> None:
        await world.until(lambda: len(world.deltas("w1")) == 2, "w1 trains")
        await world.until(lambda: 3 in world.judge.account("w1").unanswered, "its next delta is in the outbox")
        world.processes["w1"].freeze()
        version = world.state.version
        await world.until(lambda: world.state.version > version + STALENESS + 1, "others go on")
        world.processes["w1"].thaw()
        await world.until(lambda: len(world.deltas("w1")) > 3, "w1 trains again")

    world = run(make_plan(samples=300, max_staleness=STALENESS, lease_ttl_seconds=30.0), tmp_path, script)
    (at, nack), *_ = world.answers("w1", Nack)
    assert nack.reason.startswith("too stale: ")
    assert {entry.record.reason for _, entry in world.records(Left, "w1")} <= {"said bye"}
    refused, _ = world.judge.account("w1").saved[nack.seq]
    after = [entry.record for when, entry in world.records(Delta, "w1") if when > at]
    assert after[0].anchor_version > world.judge.story.publishes[refused.anchor].version + STALENESS
    assert {*positions(refused.ranges)} <= {*trained_in(after)}, "what was refused is leased to it again"


def test_48_an_anchor_in_the_future_and_a_life_that_never_was_are_refused(tmp_path: Path) -> None:
    newest: list[int] = []
    told: list[object] = []

    async def script(world: ScriptedWorld) -> None:
        async with open_puppet(world) as puppet:
            push, payload = puppet.delta(await puppet.lease(4))
            newest.append(world.state.publish)
            told.append(await puppet.refused(push, payload, anchor=push.anchor + 5))
            told.append(await puppet.refused(push, payload, anchor_term=world.state.term + 1))
            (alarm,) = [line for line in world.serving.status()["workers"] if line["worker"] == PUPPET]
            told.append(alarm["refused"])
            told.append(await puppet.ask(puppet.heartbeat(incarnation=7), Rejoin))
            told.append(type(await puppet.push(push, payload)))

    run(make_plan(puppet=True), tmp_path, script)
    assert told == [
        f"its anchor is publish {newest[0] + 5}, and the newest is {newest[0]}",
        "its anchor is of term 2, and the newest is 1",
        2,
        Rejoin(incarnation=7, reason="the server had given you up"),
        Ack,
    ]


def test_48_refusals_are_counted_by_kind_in_bounded_memory(tmp_path: Path) -> None:
    kinds: list[str] = []

    async def script(world: ScriptedWorld) -> None:
        async with open_puppet(world) as puppet:
            push, payload = puppet.delta(await puppet.lease(4))
            for ahead in range(1, 31):
                await puppet.refused(push, payload, anchor=push.anchor + ahead)
            kinds.extend(world.serving.machine.presences.refusals)

    run(make_plan(puppet=True, samples=300), tmp_path, script)
    assert kinds == ["anchor unknown"]


def test_49_other_bytes_under_an_admitted_number_are_refused(tmp_path: Path) -> None:
    reasons: list[str] = []

    async def script(world: ScriptedWorld) -> None:
        async with open_puppet(world) as puppet:
            held = await puppet.lease(4)
            first = puppet.delta(held)
            await puppet.push(*first)
            puppet.seq -= 1
            reasons.append(await puppet.refused(*puppet.delta(held, value=-1.0)))
            assert isinstance(await puppet.push(*first), Ack), "the true one is still known"

    world = run(make_plan(puppet=True), tmp_path, script)
    assert reasons == ["delta 1 was already admitted with other bytes"]
    assert len(world.deltas(PUPPET)) == 1


@pytest.mark.parametrize("change", ["other bytes", "not finite"])
def test_49_51_a_key_that_is_refused_again_and_again_is_shut_out_until_its_operator_lets_it_in(
    tmp_path: Path, change: str
) -> None:
    shut_out: list[str] = []
    shown: list[object] = []

    async def script(world: ScriptedWorld) -> None:
        async with open_puppet(world) as puppet:
            held = await puppet.lease(4)
            first = puppet.delta(held)
            if change == "other bytes":
                await puppet.push(*first)
            for strike in range(STRIKES_MAX):
                assert not puppet.told(Refused), "it has its chances"
                puppet.seq = 0
                value = strike - 100.0 if change == "other bytes" else math.nan
                await puppet.refused(*puppet.delta(held, value=value))
            refused = await puppet.ask(puppet.heartbeat(), Refused)
            assert isinstance(refused, Refused)
            shut_out.append(refused.reason)
            known = len(puppet.wanted)
            await puppet.say(first[0])  # not even a good one is heard, nor anything else
            await puppet.ask(puppet.heartbeat(), Refused)
            assert len(puppet.wanted) == known
            await world.until(lambda: world.records(Left, PUPPET), "its lease is over")
            shown.extend(world.serving.status()["quarantine"])
            assert world.serving.lift(PUPPET) == PUPPET
            await puppet.join()

    run(make_plan(puppet=True, samples=300), tmp_path, script)
    why = "delta 1 was already admitted with other bytes" if change == "other bytes" else "not finite: "
    assert shut_out[0].startswith(f"quarantined: 10 times refused, at last: {why}")
    assert shown == [{"key": PUPPET, "worker": PUPPET, "reason": shut_out[0].split("; when")[0].split(": ", 1)[1]}]


def test_47_a_worker_that_is_only_late_is_never_shut_out(tmp_path: Path) -> None:
    async def script(world: ScriptedWorld) -> None:
        async with open_puppet(world) as puppet:
            push, payload = puppet.delta(await puppet.lease(4))
            elsewhere = ((push.ranges[0][1] + 4, push.ranges[0][1] + 8),)
            for _ in range(STRIKES_MAX):
                await puppet.refused(push, payload, ranges=elsewhere)
                await puppet.refused(push, payload, anchor=push.anchor + 99)
            assert isinstance(await puppet.push(push, payload), Ack)

    world = run(make_plan(puppet=True, samples=300), tmp_path, script)
    assert not world.serving.quarantine.keys


@pytest.mark.parametrize(
    ("value", "norms", "reason"),
    [
        (math.nan, 0, "not finite: "),
        (math.inf, 0, "not finite: "),
        (-math.inf, NORMS, "not finite: "),
        (1e30, 0, "not finite: "),
        (1e18, NORMS, "its norm 9.11e+18 is more than 20 times the median "),
        (10.0, NORMS, "its norm 91.1 is more than 20 times the median "),
        (1e18, 0, "its norm 9.11e+18 is more than 1000 times the parameters' "),
        (0.0, NORMS, "it claims steps (1) and moves nothing"),
    ],
)
def test_51_a_payload_that_would_spoil_the_model_is_refused(
    tmp_path: Path, value: float, norms: int, reason: str
) -> None:
    answers: list[Message] = []
    counted: list[int] = []

    async def script(world: ScriptedWorld) -> None:
        async with open_puppet(world) as puppet:
            await world.until(lambda: len(world.state.norms) >= norms, "it is known what is usual")
            answers.append(await puppet.push(*puppet.delta(await puppet.lease(4), value=value)))
            (line,) = [line for line in world.serving.status()["workers"] if line["worker"] == PUPPET]
            counted.append(line["refused"])
            if isinstance(answers[0], Ack):
                world.stop()

    world = run(make_plan(samples=240, puppet=True), tmp_path, script)
    assert isinstance(answers[0], Nack)
    assert answers[0].reason.startswith(reason)
    assert counted == [1]
    assert not world.deltas(PUPPET)
    assert world.serving.model.theta.abs().max() < 10


class Spoiling(Regression):
    """The first student's tenth step leaves a NaN in its parameters, as an overflow does."""

    spoilt = False

    def student(self, plan: WorkerPlan, seed: int) -> "SpoilingStudent":
        student = super().student(plan, seed)
        self.spoilt, is_first = True, not self.spoilt
        return SpoilingStudent(student.workload, student.model, student.dtype, 10 if is_first else 0)


class SpoilingStudent(RegressionStudent):
    def __init__(self, workload: Regression, model: torch.nn.Module, dtype: torch.dtype, steps: int) -> None:
        super().__init__(workload, model, dtype)
        self._steps = steps

    def step(self, samples: Sequence[int]) -> float:
        loss = super().step(samples)
        self._steps -= 1
        if self._steps == 0:
            with torch.no_grad():
                next(self.model.parameters()).view(-1)[0] = math.nan
        return loss


def test_51_a_worker_whose_parameters_went_bad_does_not_keep_the_run_from_its_end(tmp_path: Path) -> None:
    async def script(world: ScriptedWorld) -> None:
        await world.until(lambda: any("round discarded" in line for line in world.lines), "it notices")

    plan = make_plan(samples=120)
    world = run(plan, tmp_path, script, workload=Spoiling(plan.dataset_samples, plan.seed))
    assert not [message for _, _, message in world.said if isinstance(message, Nack)], "nothing of it was pushed"
    assert len(world.deltas("w0")) > 3
    assert world.serving.model.theta.isfinite().all()


def test_60_a_key_that_is_revoked_while_connected_is_not_heard_from_its_next_message_on(tmp_path: Path) -> None:
    lost: list[int] = []
    revoked_at: list[float] = []

    async def script(world: ScriptedWorld) -> None:
        revoked = world.network.revoked
        async with open_puppet(world) as puppet:
            safe, payload = puppet.delta(await puppet.lease(4))
            acknowledged = await puppet.push(safe, payload)
            push, _ = puppet.delta(await puppet.lease(4))
            lost.extend(positions(push.ranges))
            revoked.add(PUPPET.encode())
            revoked_at.append(trio.current_time())
            await puppet.say(push)
            # Its heartbeats go on over a connection that is as good as ever.
            await world.until(lambda: world.records(Left, PUPPET), "it is given up")
            await world.until(lambda: {*lost} <= {*trained_in(world.deltas("w0"))}, "w0 trains what it had leased")
            revoked.clear()
            # Its connection had fallen silent, and is dialled anew.
            await world.until(lambda: puppet._end.connection, "it is connected")
            assert (await puppet.join()).last_seq == 1, "what it was told is safe is known of it"
            assert await puppet.push(replace(safe, incarnation=puppet.incarnation), payload) == acknowledged
            assert isinstance(await puppet.push(*puppet.delta(await puppet.lease(4))), Ack)

    world = run(make_plan(workers=1, samples=240, puppet=True), tmp_path, script)
    (left, entry), *_ = world.records(Left, PUPPET)
    assert entry.record == Left(worker=PUPPET, reason=f"not heard for {LEASE_SECONDS:g} s")
    assert LEASE_SECONDS - 1 < left - revoked_at[0] < LEASE_SECONDS + 2
    said = [at for at, to, _ in world.said if to == PUPPET and at > revoked_at[0]]
    assert min(said) > left, "it is told nothing either"
    assert [delta.seq for delta in world.deltas(PUPPET)] == [1, 3]
