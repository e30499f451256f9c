"""The worker's tensors: no step is lost, none is counted twice, and rounding is never mistaken for progress."""

import pytest
import torch
from tensors.models import Awkward, Flat, Run, values

from hetero_async.core.messages import PUBLISH, SNAPSHOT
from hetero_async.errors import PeerError, SchemaError
from hetero_async.formats.parts import pack_parts
from hetero_async.tensors.codecs import decode_payload, encode_payload
from hetero_async.tensors.replica import Replica, Shadow, read_object, write_object

NUMEL = 500


def train(model: torch.nn.Module, seed: int, size: float = 0.1) -> None:
    """Some steps of an optimizer, as far as a replica can tell."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            if parameter.requires_grad:
                step = values(parameter.numel(), seed + number).view(parameter.shape) * size
                parameter.sub_(step.to(parameter.dtype))


def local(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters() if p.requires_grad])


def test_a_cut_is_what_the_round_did_and_the_next_begins_at_zero() -> None:
    model = Awkward()
    replica = Replica(model)
    before = local(model)
    train(model, seed=1)
    delta = replica.cut()
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta.double(), before - local(model), rtol=0, atol=1e-6)
    assert not replica.cut().any()


def test_a_cut_is_not_part_of_the_graph_and_leaves_the_parameters_alone() -> None:
    model = Flat(NUMEL)
    replica = Replica(model)
    train(model, seed=1)
    before = local(model)
    assert not replica.cut().requires_grad
    assert torch.equal(local(model), before)


def test_only_what_is_trained_is_moved() -> None:
    model = Awkward()
    untouched = {name: value.clone() for name, value in model.state_dict().items() if "frozen" in name or "run" in name}
    replica = Replica(model)
    replica.reset(torch.full((replica.schema.numel,), 2.0))
    assert torch.equal(local(model), torch.full((replica.schema.numel,), 2.0).double())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in untouched.items())
    assert model.head.weight is model.embedding.weight


def test_parameters_in_another_memory_order_keep_their_places() -> None:
    model = torch.nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    replica = Replica(model)
    before = model.weight.detach().clone()
    target = torch.cat([before.reshape(-1), model.bias.detach()])
    replica.reset(target)
    assert torch.equal(model.weight, before)
    assert not replica.cut().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_adopting_without_progress_leaves_nothing_to_push(dtype: torch.dtype) -> None:
    model = Flat(NUMEL, dtype)
    replica = Replica(model)
    for seed in range(5):
        replica.adopt(values(NUMEL, seed))
        assert not replica.cut().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_at_an_adoption_never_becomes_progress(dtype: torch.dtype) -> None:
    model = Flat(NUMEL, dtype)
    replica = Replica(model)
    train(model, seed=1)
    progress = replica._base - model.vector.detach().float()
    for seed in range(20):
        replica.adopt(values(NUMEL, seed))
    # Twenty roundings of the parameters to 8 bits would be 1e-3; what is left is twenty roundings to 24 bits.
    torch.testing.assert_close(replica.cut(), progress, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-6), (torch.bfloat16, 4e-3)])
def test_local_is_always_anchor_minus_own_pending_plus_progress(dtype: torch.dtype, tolerance: float) -> None:
    run, model = Run(Flat(NUMEL)), Flat(NUMEL, dtype)
    replica = Replica(model)
    blob = run.server.fetch(SNAPSHOT, 0)
    assert blob is not None
    shadow = Shadow.from_snapshot(blob, NUMEL)
    replica.reset(shadow.target([]))
    pending: list[tuple[str, bytes]] = []
    for round_number in range(8):
        train(model, seed=1000 + round_number)  # a round, at whose end the delta is pushed
        payload = run.push(replica.cut(), "fp32")
        pending.append(("fp32", payload))
        train(model, seed=2000 + round_number)  # training goes on while it is under way
        run.push(values(NUMEL, seed=round_number) * 0.1, "int8")  # another worker's
        progress = replica._base.double() - local(model)
        if round_number % 3 == 1:  # not every round ends in a publish
            run.step()
            blob = run.server.fetch(PUBLISH, run.publish("int8"))
            assert blob is not None
            shadow.advance(blob)
            pending = []
            replica.adopt(shadow.target(pending))
        own = sum((decode_payload(*delta, NUMEL) for delta in pending), torch.zeros(NUMEL))
        expected = shadow.flat.double() - own.double() - progress
        torch.testing.assert_close(local(model), expected, rtol=0, atol=tolerance)
        torch.testing.assert_close(replica._base.double() - local(model), progress, rtol=0, atol=1e-6)


def test_the_sum_of_all_cuts_is_the_whole_way() -> None:
    model = Awkward()
    replica = Replica(model)
    start = local(model)
    total = torch.zeros(replica.schema.numel, dtype=torch.float64)
    for seed in range(10):
        train(model, seed)
        total += replica.cut()
    torch.testing.assert_close(start - local(model), total, rtol=0, atol=1e-6)


def test_a_model_on_several_devices_is_refused_with_their_names() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))
    with pytest.raises(SchemaError, match="cpu, meta"):
        Replica(model)


def test_what_is_no_tensor_in_a_state_dict_stays_at_home() -> None:
    class Recipe(torch.nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"version": 3}

    run = Run(Recipe(2, 2))
    assert run.server.state_dict().keys() == {"weight", "bias"}


# --- the shadow ---


def test_a_shadow_follows_the_servers_to_the_bit() -> None:
    run = Run(Flat(NUMEL))
    blob = run.server.fetch(SNAPSHOT, 0)
    assert blob is not None
    shadow = Shadow.from_snapshot(blob, NUMEL)
    for number, codec in enumerate(("int8", "int4", "bf16", "fp32", "int4"), start=1):
        run.push(values(NUMEL, seed=number), "int8")
        run.step()
        run.publish(codec, merged=(("a/0", number),))
        publish, snapshot = run.server.fetch(PUBLISH, number), run.server.fetch(SNAPSHOT, number)
        assert publish is not None
        assert snapshot is not None
        shadow.advance(publish)
        assert (shadow.number, shadow.version, shadow.merged) == (number, number, {"a/0": number})
        assert torch.equal(shadow.flat, Shadow.from_snapshot(snapshot, NUMEL).flat)


def published(count: int = 1) -> tuple[Shadow, list[bytes]]:
    """A shadow at publish 0, and the publishes after it."""
    run = Run(Flat(NUMEL))
    snapshot = run.server.fetch(SNAPSHOT, 0)
    assert snapshot is not None
    blobs = []
    for seed in range(count):
        run.push(values(NUMEL, seed), "int8")
        run.step()
        blobs.append(run.server.fetch(PUBLISH, run.publish("int4")) or b"")
    return Shadow.from_snapshot(snapshot, NUMEL), blobs


def other_delta(blob: bytes) -> bytes:
    return write_object(read_object(blob)[0], encode_payload("int4", values(NUMEL, seed=9)))


@pytest.mark.parametrize(
    "spoil",
    [
        other_delta,
        lambda blob: blob[:-1],
        lambda blob: blob + b"x",
        lambda blob: b"",
        lambda blob: write_object(read_object(blob)[0], b"junk"),
        lambda blob: pack_parts(b"junk", read_object(blob)[1]),
    ],
    ids=["other delta", "cut off", "followed by more", "empty", "payload junk", "note junk"],
)
def test_a_damaged_publish_is_refused_and_the_shadow_stays_usable(spoil) -> None:  # type: ignore[no-untyped-def]
    shadow, (blob,) = published()
    with pytest.raises(PeerError):
        shadow.advance(spoil(blob))
    assert shadow.number == 0
    shadow.advance(blob)
    assert shadow.number == 1


def test_a_publish_out_of_turn_is_refused() -> None:
    shadow, (first, second) = published(count=2)
    with pytest.raises(PeerError, match="publish 2 does not follow publish 0"):
        shadow.advance(second)
    shadow.advance(first)
    with pytest.raises(PeerError, match="publish 1 does not follow publish 1"):
        shadow.advance(first)


def test_a_snapshot_of_another_size_is_refused() -> None:
    snapshot = Run(Flat(NUMEL)).server.fetch(SNAPSHOT, 0)
    assert snapshot is not None
    with pytest.raises(PeerError):
        Shadow.from_snapshot(snapshot, NUMEL + 1)


def test_a_target_is_fresh_and_takes_the_pending_deltas_off_in_their_order() -> None:
    shadow, _ = published()
    before = shadow.flat.clone()
    deltas = [values(NUMEL, seed) for seed in (1, 2)]
    target = shadow.target([("int8", encode_payload("int8", deltas[0])), ("fp32", encode_payload("fp32", deltas[1]))])
    coded = decode_payload("int8", encode_payload("int8", deltas[0]), NUMEL)
    assert torch.equal(target, before - coded - deltas[1])
    target.zero_()
    assert torch.equal(shadow.flat, before)
