"""A follower takes what the server offers, in turn, and says where the parameters should stand."""

import math

import pytest
import safetensors.torch
import torch
from tensors.models import Awkward, Run, values

from hetero_async.core.messages import DELTA, PUBLISH, SNAPSHOT
from hetero_async.errors import PeerError
from hetero_async.tensors.buffers import without_buffers
from hetero_async.tensors.codecs import decode_payload
from hetero_async.tensors.follower import Follower
from hetero_async.tensors.replica import Replica


def test_a_follower_comes_to_stand_where_the_server_is() -> None:
    run = Run(Awkward())
    numel = run.replica.schema.numel
    follower = Follower(Replica(Awkward()))
    assert follower.schema_hash == run.replica.schema.hash
    assert follower.take(SNAPSHOT, run.server.fetch(SNAPSHOT, 0) or b"") == 0
    payload = run.push(values(numel, seed=1))
    run.step()
    run.publish("fp32", merged=(("a/0", 4),))
    assert follower.take(PUBLISH, run.server.fetch(PUBLISH, 1) or b"") == 1
    assert (follower.merged_seq("a/0"), follower.merged_seq("b/0")) == (4, 0)
    torch.testing.assert_close(follower.target([]), run.server.theta)
    delta = decode_payload("fp32", without_buffers(run.replica.schema.buffers, payload), numel)
    assert torch.equal(follower.target([("fp32", payload)]), follower.target([]) - delta)


def test_its_upload_and_deltas_are_what_the_server_expects() -> None:
    run, follower = Run(Awkward()), Follower(Replica(Awkward()))
    assert run.server.inspect_initial(follower.schema, follower.initial_upload()).refusal is None
    delta = values(run.replica.schema.numel, seed=1)
    facts = run.server.inspect("int8", follower.encode(delta, "int8"))
    assert facts.refusal is None
    assert facts.norm == pytest.approx(follower.norm(delta), rel=0.01)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_delta_that_the_server_would_refuse_is_known_before_it_is_sent(value: float) -> None:
    run, follower = Run(Awkward()), Follower(Replica(Awkward()))
    delta = torch.full((run.replica.schema.numel,), value)
    assert not math.isfinite(follower.norm(delta))
    assert run.server.inspect("fp32", follower.encode(delta, "fp32")).refusal is not None


@pytest.mark.parametrize("kind", [PUBLISH, DELTA])
def test_what_does_not_begin_with_a_snapshot_is_refused(kind: str) -> None:
    run = Run(Awkward())
    run.publish()
    follower = Follower(Replica(Awkward()))
    with pytest.raises(PeerError, match="not asked for"):
        follower.take(kind, run.server.fetch(PUBLISH, 1) or b"")


def test_the_next_life_goes_on_with_what_coarse_codecs_left_out() -> None:
    numel = Replica(Awkward()).schema.numel
    first, second, without = (Follower(Replica(Awkward())) for _ in range(3))
    first.encode(values(numel, seed=1), "2bit")
    first.pushed(1)
    second.restore_feedback(first.feedback(), accepted=[1], unanswered=[])
    first.answered(1, True)
    encoded = [follower.encode(values(numel, seed=2), "2bit") for follower in (first, second, without)]
    assert encoded[0] == encoded[1] != encoded[2]
    assert without.feedback() == b""


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"not it", "not what error feedback keeps"),
        (safetensors.torch.save({"residual": torch.zeros(3)}), "it is of another model: this one has"),
    ],
)
def test_what_another_model_left_out_is_refused(content: bytes, complaint: str) -> None:
    follower = Follower(Replica(Awkward()))
    with pytest.raises(PeerError, match=complaint):
        follower.restore_feedback(content, [], [])
    assert follower.feedback() == b""
