"""A model's buffers: what travels, how a merge averages them, what a worker makes of the run's, what is refused."""

from collections.abc import Callable, Mapping

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors.models import Awkward, Flat, Run, values
from torch import nn

from hetero_async.core.admission import Cause
from hetero_async.core.messages import PUBLISH, SNAPSHOT
from hetero_async.errors import LogCorrupt, PeerError, SchemaError
from hetero_async.formats.compression import compress
from hetero_async.formats.parts import pack_parts, unpack_parts
from hetero_async.tensors.buffers import buffers_in, initial_values, merged, with_buffers
from hetero_async.tensors.codecs import encode_payload
from hetero_async.tensors.follower import Follower
from hetero_async.tensors.model import ServerModel
from hetero_async.tensors.replica import Replica, Shadow, read_object, write_object
from hetero_async.tensors.schema import Schema, difference, schema_of

MEAN, VARIANCE, COUNT, STEPS = "norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "steps"


class Watching(nn.Module):
    """One parameter, and whatever buffers a test gives it."""

    def __init__(self, **buffers: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)


def numbered(model: nn.Module, changes: Mapping[str, torch.Tensor]) -> dict[int, torch.Tensor]:
    names = [spec.name for spec in schema_of(model).buffers]
    return {names.index(name): value for name, value in changes.items()}


def step_of(run: Run, *given: tuple[int, Mapping[str, torch.Tensor]]) -> None:
    """A merge of one delta for each: its samples, and the buffers in it."""
    model = Awkward()
    for samples, changes in given:
        run.push(values(run.replica.schema.numel, seed=samples), buffers=numbered(model, changes), samples=samples)
    run.step()


def push_mean(run: Run, seed: int, samples: int) -> None:
    buffers = numbered(Awkward(), {MEAN: values(6, seed)})
    run.push(values(run.replica.schema.numel, seed), buffers=buffers, samples=samples)


def of(run: Run, name: str) -> list[float]:
    return run.server.state_dict()[name].reshape(-1).tolist()


def test_a_merge_averages_statistics_by_samples_and_takes_the_largest_count() -> None:
    run = Run(Awkward())
    first = {MEAN: torch.full((6,), 1.0), COUNT: torch.tensor([40])}
    second = {MEAN: torch.full((6,), 5.0), VARIANCE: torch.full((6,), 9.0), COUNT: torch.tensor([8])}
    step_of(run, (30, first), (10, second))
    assert of(run, MEAN) == [2.0] * 6
    assert of(run, VARIANCE) == [9.0] * 6, "of the one that has seen any"
    assert (of(run, COUNT), of(run, STEPS)) == ([40], [7])


def test_a_merge_of_one_delta_has_its_buffers_to_the_bit_and_nothing_of_what_was_before() -> None:
    run = Run(Awkward())
    step_of(run, (3, {MEAN: values(6, seed=1), COUNT: torch.tensor([40])}))
    alone = values(6, seed=2)
    step_of(run, (7, {MEAN: alone, COUNT: torch.tensor([12])}))
    assert of(run, MEAN) == alone.tolist()
    assert of(run, COUNT) == [12]


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(st.integers(1, 2**24), FINITE), min_size=1, max_size=6))
def test_the_average_is_the_formula_in_fp64(given: list[tuple[int, float]]) -> None:
    (mean,) = merged((torch.zeros(1),), [(samples, {0: torch.tensor([value])}) for samples, value in given])
    total = numpy.float64(0)
    for samples, value in given:
        total += numpy.float64(value) * samples
    expected = numpy.float32(total / sum(samples for samples, _ in given))
    assert mean.numpy().tobytes() == expected.reshape(1).tobytes()
    if len({value for _, value in given}) == 1:
        assert mean.item() == given[0][1], "what all agree on is not rounded away"


def test_a_model_without_buffers_has_the_bytes_that_it_had() -> None:
    schema, delta = schema_of(Flat(8)), values(8, seed=1)
    assert schema.to_bytes() == b'{"tensors":[["vector",[8]]],"aliases":[]}'
    assert Follower(Replica(Flat(8))).encode(delta, "int8", {}) == encode_payload("int8", delta)


def test_what_does_not_change_does_not_travel() -> None:
    model = Awkward().eval()
    replica = Replica(model)
    model(torch.arange(11))
    changes = replica.cut_buffers()
    assert changes == {}
    delta = values(replica.schema.numel, seed=1)
    payload = Follower(replica).encode(delta, "int8", changes)
    assert len(payload) == len(encode_payload("int8", delta)) + 16, "two lengths"
    model.train()
    model(torch.arange(11))
    assert sorted(replica.cut_buffers()) == sorted(numbered(model, dict.fromkeys([MEAN, VARIANCE, COUNT], delta)))
    assert replica.cut_buffers() == {}


def test_what_a_round_has_changed_is_pushed_though_the_run_came_in_between() -> None:
    model = Awkward()
    replica = Replica(model)
    run_values = initial_values(replica.schema.buffers, model.state_dict())
    model(torch.arange(11))
    replica.adopt(torch.zeros(replica.schema.numel), tuple(value + 1 for value in run_values))
    assert len(replica.cut_buffers()) == 3


def adopting(own: nn.Module, **run: torch.Tensor) -> tuple[Replica, tuple[torch.Tensor, ...]]:
    replica = Replica(own)
    return replica, tuple(run[spec.name] for spec in replica.schema.buffers)


def test_a_worker_takes_the_run_s_buffers_and_keeps_half_of_what_it_has_seen_since_its_push() -> None:
    model = Watching(mean=torch.tensor([4.0]), count=torch.tensor(5), idle=torch.tensor([1.0]))
    replica, run = adopting(model, mean=torch.tensor([2.0]), count=torch.tensor([9]), idle=torch.tensor([3.0]))
    model.mean += 4
    model.count += 2
    for _ in range(2):  # the second time there is nothing new
        replica.adopt(torch.ones(3), run)
        assert (model.mean.item(), model.count.item(), model.idle.item()) == (5.0, 9, 3.0)
    replica.cut_buffers()
    replica.adopt(torch.ones(3), tuple(value + 1 for value in run))
    assert (model.mean.item(), model.count.item(), model.idle.item()) == (3.0, 10, 4.0), "nothing seen since"
    model.count += 5
    replica.adopt(torch.ones(3), tuple(value + 2 for value in run))
    assert model.count.item() == 15, "no batch is forgotten"
    model.mean.fill_(torch.nan)
    replica.reset(torch.ones(3), run)
    assert (model.mean.item(), model.count.item(), replica.cut_buffers()) == (2.0, 9, {})


def test_a_variance_stays_positive_whatever_the_run_s_is() -> None:
    model = Watching(variance=torch.tensor([10.0]))
    replica, run = adopting(model, variance=torch.tensor([2.0]))
    model.variance.fill_(1.0)
    replica.adopt(torch.ones(3), run)
    assert model.variance.item() == 1.5


def test_a_buffer_that_was_put_in_another_s_place_is_seen_too() -> None:
    model = Watching(mean=torch.zeros(2))
    replica = Replica(model)
    model.mean = torch.ones(2)
    assert replica.cut_buffers()[0].tolist() == [1.0, 1.0]
    replica.adopt(torch.ones(3), (torch.full((2,), 5.0),))
    assert model.mean.tolist() == [5.0, 5.0]


def test_what_is_cut_stays_what_it_was_while_training_goes_on() -> None:
    model = Watching(mean=torch.zeros(2))
    replica = Replica(model)
    model.mean += 1
    changes = replica.cut_buffers()
    model.mean += 1
    assert changes[0].tolist() == [1.0, 1.0]


def followed(run: Run) -> Shadow:
    numel, specs = run.replica.schema.numel, run.replica.schema.buffers
    return Shadow.from_snapshot(run.server.fetch(SNAPSHOT, run.server.newest_publish()) or b"", numel, specs)


def test_publishes_and_snapshots_take_workers_to_the_buffers_of_the_server() -> None:
    run = Run(Awkward())
    shadow = followed(run)
    for number in (1, 2, 3):
        step_of(run, (3, {MEAN: values(6, seed=number)} if number < 3 else {}), (4, {COUNT: torch.tensor([number])}))
        blob = run.server.fetch(PUBLISH, run.publish("int8")) or b""
        assert len(buffers_in(run.replica.schema.buffers, read_object(blob)[1])) == (2 if number < 3 else 1)
        shadow.advance(blob)
        for copy in (shadow, followed(run)):
            assert all(map(torch.equal, copy.buffers, run.server.buffers))


def test_a_publish_with_other_buffers_is_not_followed() -> None:
    run = Run(Awkward())
    shadow, specs = followed(run), run.replica.schema.buffers
    step_of(run, (3, {MEAN: values(6, seed=1)}))
    note, payload = read_object(run.server.fetch(PUBLISH, run.publish()) or b"")
    coded = bytes(unpack_parts(payload, 2)[0])
    for changes in ({}, numbered(Awkward(), {MEAN: values(6, seed=2)})):
        with pytest.raises(PeerError, match="the parameters are not the server's"):
            shadow.advance(write_object(note, with_buffers(specs, coded, changes)))
    with pytest.raises(PeerError, match="a snapshot has 0 of the model's 4 buffers"):
        Shadow.from_snapshot(write_object(note, with_buffers(specs, coded, {})), run.replica.schema.numel, specs)


def test_a_checkpoint_goes_on_to_the_same_bits_and_the_same_publishes() -> None:
    run = Run(Awkward())
    step_of(run, (3, {MEAN: values(6, seed=1)}))
    run.publish()
    step_of(run, (5, {VARIANCE: values(6, seed=2)}))
    push_mean(run, seed=4, samples=9)
    copy, kept = ServerModel(), len(run.entries)
    copy.load(run.server.snapshot())
    push_mean(run, seed=6, samples=2)
    run.step()
    run.publish()
    for entry in run.entries[kept:]:
        copy.apply(entry)
    assert copy.model_hash() == run.server.model_hash()
    assert copy.fetch(PUBLISH, 2) == run.server.fetch(PUBLISH, 2)


@pytest.mark.parametrize("whose", ["buffers", "shadow_buffers"])
def test_the_model_s_hash_is_of_the_buffers_too(whose: str) -> None:
    run = Run(Awkward())
    snapshot = run.server.snapshot()
    changes = dict(enumerate(run.server.buffers)) | numbered(Awkward(), {MEAN: values(6, seed=1)})
    packed = with_buffers(run.replica.schema.buffers, b"", changes)
    arrays = {**snapshot.arrays, whose: numpy.frombuffer(packed, dtype=numpy.uint8)}
    with pytest.raises(LogCorrupt, match="do not hash"):
        ServerModel().load(type(snapshot)(arrays=arrays, model_hash=snapshot.model_hash))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_a_floating_or_complex_buffer_of_any_dtype_is_averaged_and_keeps_its_dtype(dtype: torch.dtype) -> None:
    start, end = torch.tensor([[0.1, 2.0]], dtype=dtype), torch.tensor([[0.75, -2.5]], dtype=dtype)
    model = Watching(found=start.clone(), constant=start.clone())
    run = Run(model)
    model.found.copy_(end * 2)
    changes = run.replica.cut_buffers()
    run.push(torch.ones(3), buffers=changes)
    model.found.zero_()
    run.push(torch.ones(3), buffers=run.replica.cut_buffers())
    run.step()
    exported = run.server.state_dict()
    assert exported["found"].dtype == dtype and torch.equal(exported["found"], end)
    assert torch.equal(exported["constant"], start), "fp64 that nobody has changed keeps all digits"
    run.replica.adopt(torch.ones(3), run.server.buffers)
    assert torch.equal(model.found, end) and torch.equal(model.constant, start)


def test_a_truth_value_that_one_has_found_holds() -> None:
    model = Watching(is_ready=torch.tensor([False, False]))
    run = Run(model)
    for found in ([True, False], [False, False]):
        run.push(torch.ones(3), buffers={0: torch.tensor(found).long()})
    run.step()
    exported = run.server.state_dict()["is_ready"]
    assert exported.dtype == torch.bool and exported.tolist() == [True, False]


def test_a_buffer_that_is_not_kept_with_the_model_stays_where_it_is() -> None:
    model = Watching()
    model.register_buffer("cache", torch.zeros(4), persistent=False)
    assert schema_of(model).buffers == ()


def test_shared_buffers_travel_once_and_come_back_under_each_name() -> None:
    model = Awkward()
    model.again = model.norm
    schema = schema_of(model)
    assert [spec.name for spec in schema.buffers] == [STEPS, MEAN, VARIANCE, COUNT]
    assert (f"again.{MEAN.partition('.')[2]}", MEAN) in schema.aliases
    assert Schema.from_bytes(schema.to_bytes()) == schema
    run = Run(model)
    run.push(values(schema.numel, seed=1), buffers=numbered(model, {MEAN: values(6, seed=2)}))
    run.step()
    exported = run.server.state_dict()
    frozen = {"frozen.weight", "frozen.bias"}  # they stay where they are
    assert exported.keys() == model.state_dict().keys() - frozen
    assert torch.equal(exported["again.running_mean"], values(6, seed=2))


@pytest.mark.parametrize(
    ("buffer", "complaint"),
    [
        (torch.zeros(2).to_sparse(), "buffer odd is torch.float32, torch.sparse_coo: only dense buffers"),
        (torch.zeros(2, dtype=torch.uint64), "buffer odd is torch.uint64, torch.strided: only dense buffers"),
        (torch.zeros(2, dtype=torch.complex128), "buffer odd is torch.complex128, torch.strided: only dense buffers"),
        (nn.parameter.UninitializedBuffer(), "odd has no shape yet: run one batch"),
    ],
    ids=str,
)
def test_what_cannot_be_averaged_is_said_before_joining(buffer: torch.Tensor, complaint: str) -> None:
    with pytest.raises(SchemaError, match=complaint):
        schema_of(Watching(odd=buffer))


def test_other_buffers_are_another_model() -> None:
    plain, watching = schema_of(Watching()), schema_of(Watching(seen=torch.zeros(2)))
    assert difference(plain, watching) == "the model differs from the run's: buffer seen [2] floating is not expected"
    assert difference(watching, plain).endswith("buffer seen [2] floating is expected and is missing")
    counting = schema_of(Watching(seen=torch.zeros(2, dtype=torch.int32)))
    assert difference(watching, counting).endswith("buffer seen: expected [2] floating, found [2] integer")
    assert difference(watching, schema_of(Watching(seen=torch.zeros(2, dtype=torch.bfloat16)))) == ""


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_buffer_that_is_not_finite_is_not_pushed_and_refused_like_a_parameter(value: float) -> None:
    model = Watching(mean=torch.zeros(2), mask=torch.full((2,), -torch.inf))
    run = Run(model)
    assert run.replica.cut_buffers() == {}
    follower, delta = Follower(run.replica), torch.ones(3)
    assert follower.norm(delta, {}) == pytest.approx(3**0.5)
    model.mean[1] = value
    changes = run.replica.cut_buffers()
    assert not follower.norm(delta, changes) < torch.inf
    refusal = run.server.inspect("fp32", follower.encode(delta, "fp32", changes)).refusal
    assert refusal is not None and refusal.cause == Cause.INFINITE
    assert refusal.reason == "not finite: buffer mean holds a NaN or an infinity"


def packed(which: bytes, floating: int, integers: int) -> bytes:
    return pack_parts(compress(which), encode_payload("fp32", torch.zeros(floating)), compress(bytes(8 * integers)))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda coded: coded,
        lambda coded: pack_parts(coded, b"junk"),
        lambda coded: pack_parts(coded, packed(b"\1\1", 6, 1)),
        lambda coded: pack_parts(coded, packed(b"\0\2\0\0", 6, 0)),
        lambda coded: pack_parts(coded, packed(b"\0\1\0\0", 7, 0)),
        lambda coded: pack_parts(coded, packed(b"\0\0\0\1", 0, 0)),
        lambda coded: pack_parts(coded, packed(b"\0\0\0\1", 0, 1)) + b"more",
    ],
)
def test_what_is_not_a_model_s_buffers_is_refused(spoil: Callable[[bytes], bytes]) -> None:
    run = Run(Awkward())
    coded = encode_payload("fp32", values(run.replica.schema.numel, seed=1))
    whole = with_buffers(run.replica.schema.buffers, coded, numbered(Awkward(), {MEAN: values(6, seed=1)}))
    assert run.server.inspect("fp32", whole).refusal is None
    refusal = run.server.inspect("fp32", spoil(coded)).refusal
    assert refusal is not None and refusal.cause == Cause.UNREADABLE


def test_initial_parameters_without_their_buffers_are_refused() -> None:
    run, other = Run(Watching(seen=torch.zeros(2))), Watching(seen=torch.zeros(2, dtype=torch.int64))
    for upload in (Replica(Watching()).initial_upload(), Replica(other).initial_upload()):
        refusal = run.server.inspect_initial(run.replica.schema.to_bytes(), upload).refusal
        assert refusal is not None and "no buffer seen of 2 floating numbers" in refusal.reason


def test_a_payload_of_buffers_that_all_change_keeps_within_the_limit() -> None:
    model = Watching(**{f"seen{number}": torch.zeros(5, 7) for number in range(40)}, counts=torch.zeros(500).long())
    run = Run(model)
    noise = {index: torch.randn(value.shape) if value.is_floating_point() else torch.randint(-2**62, 2**62, value.shape)
             for index, value in enumerate(run.server.buffers)}  # fmt: skip
    payload = with_buffers(run.replica.schema.buffers, encode_payload("fp32", torch.randn(3)), noise)
    assert len(payload) <= run.server.payload_limit(b"")
    assert all(map(torch.equal, buffers_in(run.replica.schema.buffers, payload).values(), noise.values()))


def test_a_buffer_that_is_a_view_is_read_as_what_it_shows() -> None:
    model = Watching(places=torch.arange(3).expand(1, -1), every_other=torch.arange(6.0)[::2])
    run = Run(model)
    assert run.replica.cut_buffers() == {}
    model.every_other += 1
    assert run.replica.cut_buffers()[1].tolist() == [1.0, 3.0, 5.0]
