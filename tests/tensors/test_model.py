"""The server's model: the same log gives the same bits, and what it exports is the user's model."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors.models import Awkward, Flat, Run, at_merge, eventful, values

from hetero_async.core.admission import Cause
from hetero_async.core.messages import INITIAL, PUBLISH, SNAPSHOT
from hetero_async.core.outer import RULES
from hetero_async.core.records import Entry, RunSettings, Stepped
from hetero_async.errors import LogCorrupt
from hetero_async.formats.compression import compress
from hetero_async.formats.parts import pack_parts
from hetero_async.loading import load
from hetero_async.ports import ModelSnapshot
from hetero_async.tensors import outer
from hetero_async.tensors.codecs import CODECS, decode_payload, encode_payload
from hetero_async.tensors.model import PUBLISHES_HELD_MAX, ServerModel
from hetero_async.tensors.passes import PIECE
from hetero_async.tensors.replica import Shadow, read_object
from hetero_async.tensors.schema import schema_of

ROOT = Path(__file__).parents[2]
# A whole block of a pass, and one that is neither a whole block of a pass nor of a codec.
NUMEL = PIECE + 1037
# Of a merge of whole rounds `delayed-nesterov` makes what `nesterov` does.
OF_ROUNDS = sorted(RULES.keys() - {"delayed-nesterov"})


def applied(entries: list[Entry], server: ServerModel | None = None) -> ServerModel:
    server = server or ServerModel()
    for entry in entries:
        server.apply(entry)
    return server


def test_an_outer_step_moves_the_parameters_by_the_weighted_mean() -> None:
    run = Run(Flat(300), RunSettings(run="test", rule="sgd"))
    start, first, second = run.server.theta.clone(), values(300, seed=1), values(300, seed=2)
    run.push(first)
    run.push(second)
    run.step(weights=(0.75, 0.25), gain=0.5)
    assert torch.equal(run.server.theta, start - 0.5 * (0.75 * first + 0.25 * second))


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_pass_over_blocks_gives_the_bits_of_the_plain_formula(rule: str) -> None:
    settings = RunSettings(run="test", rule=rule, outer_learning_rate=0.7, momentum=0.9)
    run = Run(Flat(NUMEL), settings)
    theta = run.server.theta.clone()
    buffers = [torch.zeros(NUMEL) for _ in range(outer.buffers_of(rule))]
    for version, weights in enumerate(((0.6, 0.3, 0.1), (1.0, 0.5, 0.25))):
        codecs = ("int8", "int4", "bf16")
        payloads = [run.push(values(NUMEL, seed=seed), codec) for seed, codec in enumerate(codecs)]
        run.step(weights, gain=0.7)
        mean = torch.zeros(NUMEL)
        for codec, payload, weight in zip(codecs, payloads, weights, strict=True):
            mean = mean + decode_payload(codec, payload, NUMEL) * torch.tensor(weight)
        outer.step(theta, buffers, mean, torch.empty(NUMEL), RULES[rule].coefficients(at_merge(version), settings))
    assert torch.equal(run.server.theta, theta)


def test_deltas_wait_for_the_step_that_names_them() -> None:
    run = Run(Flat(100))
    before = run.server.model_hash()
    run.push(values(100, seed=1))
    assert run.server.model_hash() == before
    run.step()
    assert run.server.model_hash() != before


# --- the same log, the same bits ---


@pytest.mark.parametrize("rule", sorted(RULES))
def test_replay_gives_the_same_bits_with_any_number_of_threads(rule: str) -> None:
    run = eventful(NUMEL, rule)
    used = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert applied(run.entries).model_hash() == run.server.model_hash()
    finally:
        torch.set_num_threads(used)


def test_replay_gives_the_same_bits_on_any_kind_of_cpu() -> None:
    script = f"""
import torch
from tensors.models import eventful
print(torch.backends.cpu.get_cpu_capability())
for rule in {OF_ROUNDS!r}:
    print(eventful({NUMEL}, rule).server.model_hash().hex())
"""
    answers = {}
    for capability in ("default", "avx2", "avx512"):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        ran = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        used, *hashes = ran.stdout.split()
        answers[used] = hashes
    assert len(answers["DEFAULT"]) == len(set(answers["DEFAULT"])) == len(OF_ROUNDS)
    assert all(hashes == answers["DEFAULT"] for hashes in answers.values()), answers


@pytest.mark.parametrize("rule", sorted(RULES))
def test_going_on_from_a_snapshot_anywhere_gives_the_bits_of_never_stopping(rule: str) -> None:
    run = eventful(1000, rule)
    for kept in range(1, len(run.entries) + 1):
        snapshot = applied(run.entries[:kept]).snapshot()
        again = ServerModel()
        again.load(snapshot)
        assert again.model_hash() == snapshot.model_hash
        assert applied(run.entries[kept:], again).model_hash() == run.server.model_hash()


def test_a_snapshot_is_a_copy() -> None:
    run = eventful(1000, "nesterov")
    snapshot = run.server.snapshot()
    run.step()
    run.publish("int8")
    again = ServerModel()
    again.load(snapshot)
    assert again.model_hash() == snapshot.model_hash


@pytest.mark.parametrize("name", ["parameters", "shadow", "momentum/0"])
def test_a_snapshot_that_was_changed_is_not_loaded(name: str) -> None:
    snapshot = eventful(1000, "nesterov").server.snapshot()
    arrays = {key: numpy.array(value) for key, value in snapshot.arrays.items()}
    arrays[name].view(numpy.uint8)[17] ^= 1
    with pytest.raises(LogCorrupt):
        ServerModel().load(ModelSnapshot(arrays=arrays, model_hash=snapshot.model_hash))


def test_initial_parameters_that_the_genesis_record_does_not_name_are_corrupt() -> None:
    genesis = Run(Flat(100)).entries[0]
    other = Run(Flat(101)).entries[0]
    for payload in (other.payload, genesis.payload[:-1], b""):
        with pytest.raises(LogCorrupt):
            ServerModel().apply(replace(genesis, payload=payload))


def test_a_logged_delta_that_does_not_decode_is_corrupt_and_its_step_is_named() -> None:
    run = Run(Flat(100))
    run.push(values(100, seed=1))
    entries = [run.entries[0], replace(run.entries[1], payload=b"junk")]
    server = applied(entries)
    step = Stepped(version=1, deltas=(2,), weights=(1.0,), gain=0.7)
    with pytest.raises(LogCorrupt, match=r"record 3 \(Stepped\)"):
        server.apply(Entry(lsn=3, term=1, record=step))


# --- publishes and snapshots for workers ---


def test_what_a_publish_loses_goes_with_the_next() -> None:
    run = Run(Flat(1000))
    run.push(values(1000, seed=1))
    run.step()
    shadow = Run(Flat(1000)).server.theta
    distances = []
    for _ in range(5):
        blob = run.server.fetch(PUBLISH, run.publish("int4"))
        assert blob is not None
        shadow += decode_payload("int4", read_object(blob)[1], 1000)
        distances.append(float((run.server.theta - shadow).norm()))
    assert all(later < 0.5 * earlier for earlier, later in pairwise(distances))


def test_a_small_models_two_newest_publishes_are_held() -> None:
    run = Run(Flat(1))
    assert run.server.oldest_publish() == 1
    for number in range(1, 5):
        run.publish("int4")
        assert run.server.oldest_publish() == max(1, number - 1)
        assert run.server.fetch(PUBLISH, number) is not None
    assert run.server.fetch(PUBLISH, 2) is None
    assert run.server.fetch(PUBLISH, 5) is None


def test_publishes_are_held_while_they_are_fewer_bytes_than_a_snapshot() -> None:
    run = Run(Flat(20_000))
    for seed in range(12):
        run.push(values(20_000, seed))
        run.step()
        run.publish("int8")
    oldest = run.server.oldest_publish()
    held = [len(run.server.fetch(PUBLISH, number) or b"") for number in range(oldest, 13)]
    assert oldest > 1
    assert all(held)
    assert sum(held) <= 4 * 20_000 < sum(held) + max(held)


def test_no_more_publishes_are_held_than_the_limit() -> None:
    run = Run(Flat(100_000))
    for _ in range(PUBLISHES_HELD_MAX + 5):
        run.publish("int8")  # nothing has changed, so each is a few bytes
    assert run.server.oldest_publish() == 6


def test_only_the_present_snapshot_is_made_and_the_last_two_are_kept() -> None:
    run = Run(Flat(100))
    for _ in range(3):
        number = run.publish()
        assert run.server.fetch(SNAPSHOT, number + 1) is None
        assert run.server.fetch(SNAPSHOT, number) is not None
    assert [run.server.fetch(SNAPSHOT, number) is not None for number in range(4)] == [False, False, True, True]


def test_a_snapshot_is_of_the_shadow_not_of_the_parameters() -> None:
    run = Run(Flat(500))
    run.push(values(500, seed=1))
    run.step()
    run.publish("int4")
    run.push(values(500, seed=2))
    run.step()
    blob = run.server.fetch(SNAPSHOT, 1)
    assert blob is not None
    assert not torch.equal(Shadow.from_snapshot(blob, 500).flat, run.server.theta)


def test_a_shadow_in_use_by_a_fetch_is_never_written_to() -> None:
    run = Run(Flat(500))
    shadow = run.server._standing.shadow
    before = shadow.clone()
    run.push(values(500, seed=1))
    run.step()
    run.publish("int8")
    assert torch.equal(shadow, before)


def test_after_a_restart_no_publish_is_held_but_a_snapshot_can_be_fetched() -> None:
    run = eventful(1000, "nesterov")
    again = ServerModel()
    again.load(run.server.snapshot())
    assert again.oldest_publish() == 5
    assert again.fetch(PUBLISH, 4) is None
    assert again.fetch(SNAPSHOT, 4) == run.server.fetch(SNAPSHOT, 4)


def test_before_genesis_there_is_nothing_to_fetch_and_no_model_to_differ_from() -> None:
    server = ServerModel()
    assert server.fetch(SNAPSHOT, 0) is None
    assert server.fetch(INITIAL, 0) is None
    assert server.fetch(PUBLISH, 0) is None
    assert server.mismatch(schema_of(Flat(3)).to_bytes()) == ""


def test_a_model_that_differs_from_the_runs_is_told_how() -> None:
    server = Run(Flat(3)).server
    assert server.mismatch(schema_of(Flat(3)).to_bytes()) == ""
    assert "expected [3], found [4]" in server.mismatch(schema_of(Flat(4)).to_bytes())
    assert "not a schema" in server.mismatch(b"{}")


# --- what a peer may send ---


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_an_inspected_delta_has_its_norm(codec: str) -> None:
    server = Run(Flat(NUMEL)).server
    payload = encode_payload(codec, values(NUMEL, seed=4))
    facts = server.inspect(codec, payload)
    assert facts.refusal is None
    assert facts.norm == pytest.approx(float(decode_payload(codec, payload, NUMEL).double().norm()), rel=1e-5)


def test_an_inspected_delta_is_held_against_the_parameters_or_as_many_ones() -> None:
    model = Flat(NUMEL)
    with torch.no_grad():
        next(model.parameters()).fill_(3.0)
    payload = encode_payload("int8", values(NUMEL, seed=4))
    assert Run(model).server.inspect("int8", payload).scale == pytest.approx(3 * NUMEL**0.5)
    with torch.no_grad():
        next(model.parameters()).zero_()
    assert Run(model).server.inspect("int8", payload).scale == pytest.approx(NUMEL**0.5)


def raw_scales(codec: str, scale: float) -> bytes:
    """A delta of 100 elements with one scale that no encoder would write, and zeros under it."""
    raw = CODECS[codec].encode(torch.zeros(100))
    raw[:4] = torch.tensor([scale]).view(torch.uint8)
    return compress(raw.numpy().tobytes())


HOSTILE: dict[str, tuple[str, Callable[[], bytes]]] = {
    "empty": ("int8", lambda: b""),
    "not zstd": ("int8", lambda: b"\x00" * 400),
    "shorter": ("int8", lambda: encode_payload("int8", torch.ones(64))),
    "longer": ("fp32", lambda: encode_payload("fp32", torch.ones(101))),
    "another codec's": ("int4", lambda: encode_payload("int8", torch.ones(100))),
    "cut off": ("fp32", lambda: encode_payload("fp32", values(100, seed=1))[:-1]),
    "followed by more": ("fp32", lambda: encode_payload("fp32", values(100, seed=1)) + b"x"),
    "unknown codec": ("pickle", lambda: encode_payload("fp32", torch.ones(100))),
    "a place beyond the vector": ("topk", lambda: encode_payload("topk", values(4096, seed=1))),
    "one NaN": ("fp32", lambda: encode_payload("fp32", torch.ones(100).index_fill(0, torch.tensor([99]), torch.nan))),
    "an infinity": ("bf16", lambda: encode_payload("bf16", torch.full((100,), torch.inf))),
    "squares overflow": ("fp32", lambda: encode_payload("fp32", torch.full((100,), 1e30))),
    "int8 scale NaN over zeros": ("int8", lambda: raw_scales("int8", float("nan"))),
    "int8 scale infinite over zeros": ("int8", lambda: raw_scales("int8", float("inf"))),
    "int4 scale NaN over zeros": ("int4", lambda: raw_scales("int4", float("nan"))),
    "int4 scale infinite over zeros": ("int4", lambda: raw_scales("int4", float("-inf"))),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_delta_is_refused_with_a_reason(kind: str) -> None:
    codec, payload = HOSTILE[kind]
    facts = Run(Flat(100)).server.inspect(codec, payload())
    assert facts.refusal and "\n" not in facts.refusal.reason


@given(codec=st.text(max_size=9) | st.sampled_from(sorted(CODECS)), payload=st.binary(max_size=200))
def test_inspecting_never_raises(codec: str, payload: bytes) -> None:
    server = Run(Flat(4)).server
    server.inspect(codec, payload)
    assert server.inspect_initial(payload, payload).refusal


def upload_of(model: torch.nn.Module) -> tuple[bytes, bytes]:
    replica = Run(model).replica
    return replica.schema.to_bytes(), replica.initial_upload()


def test_good_initial_parameters_are_accepted_and_bad_ones_refused() -> None:
    schema, upload = upload_of(Awkward())
    huge = b'{"tensors":[["a",[281474976710655,281474976710655]]],"aliases":[]}'
    diverged = Flat(10)
    with torch.no_grad():
        diverged.vector[3] = torch.nan
    unknown_dtype = b'{"a":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[0,1]}}'
    constants = len(unknown_dtype).to_bytes(8, "little") + unknown_dtype + b"x"
    parameters = encode_payload("fp32", torch.ones(2))
    server = ServerModel()
    assert server.inspect_initial(schema, upload).refusal is None
    assert server.inspect_initial(huge, upload).refusal
    assert server.inspect_initial(schema, upload[:-1]).refusal
    assert server.inspect_initial(schema, pack_parts(parameters, b"")).refusal
    assert server.inspect_initial(schema_of(Flat(2)).to_bytes(), pack_parts(parameters, constants)).refusal
    refusal = server.inspect_initial(*upload_of(diverged)).refusal
    assert refusal and refusal.cause == Cause.INFINITE


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_no_payload_is_larger_than_the_limit(codec: str) -> None:
    run = Run(Flat(50_000))
    noise = torch.frombuffer(bytearray(os.urandom(200_000)), dtype=torch.int32).view(torch.float32)
    assert len(encode_payload(codec, noise)) <= run.server.payload_limit(b"")


# --- export ---


@pytest.mark.parametrize("steps", [0, 2])
def test_an_export_loads_into_the_users_model(steps: int, tmp_path: Path) -> None:
    trained = Awkward()
    trained.norm.running_mean = torch.arange(6.0)
    run = Run(trained)
    for seed in range(steps):
        run.push(values(run.replica.schema.numel, seed))
        run.step()
    run.server.export(tmp_path / "model.safetensors")
    fresh = Awkward()
    load(tmp_path / "model.safetensors", fresh)
    assert torch.equal(Run(fresh).server.theta, run.server.theta)
    assert torch.equal(fresh.norm.running_mean, torch.arange(6.0))
    assert fresh.head.weight is fresh.embedding.weight
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_an_export_from_a_checkpoint_is_the_same() -> None:
    run, again = Run(Awkward()), ServerModel()
    again.load(run.server.snapshot())
    expected, found = run.server.state_dict(), again.state_dict()
    assert expected.keys() == found.keys() == Awkward().state_dict().keys() - {"frozen.weight", "frozen.bias"}
    assert all(torch.equal(expected[name], found[name]) for name in expected)
