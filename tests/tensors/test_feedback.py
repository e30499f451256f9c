"""Error feedback: nothing that a coarse codec leaves out is forgotten, and nothing of a refused push is remembered."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetero_async.tensors.codecs import WITH_FEEDBACK, decode_payload, encode_payload
from hetero_async.tensors.feedback import DECAY, ErrorFeedback

NUMEL = 300
CODECS = sorted(WITH_FEEDBACK)


def delta_of(seed: int) -> torch.Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(seed))


def pushed(feedback: ErrorFeedback, seq: int, codec: str = "2bit") -> bytes:
    payload = feedback.encode(delta_of(seq), codec)
    feedback.pushed(seq)
    return payload


@pytest.mark.parametrize("codec", CODECS)
def test_what_one_push_leaves_out_goes_into_the_next(codec: str) -> None:
    feedback = ErrorFeedback()
    first, second = pushed(feedback, 1, codec), pushed(feedback, 2, codec)
    assert first == encode_payload(codec, delta_of(1))
    left_out = delta_of(1) - decode_payload(codec, first, NUMEL)
    assert second == encode_payload(codec, delta_of(2) + DECAY * left_out)


@pytest.mark.parametrize("codec", CODECS)
def test_of_one_vector_pushed_again_and_again_all_arrives(codec: str) -> None:
    """Of a sum of n, all but what is under way: that is bounded by the decay and does not grow with n."""
    feedback, vector, rounds = ErrorFeedback(), delta_of(0), 400
    arrived = torch.zeros(NUMEL)
    for seq in range(1, rounds + 1):
        arrived += decode_payload(codec, feedback.encode(vector, codec), NUMEL)
        feedback.pushed(seq)
        feedback.answered(seq, True)
    lost = {"2bit": 0.1, "topk": 0.75}[codec]  # the decay forgets a twentieth of the residual each time
    assert (arrived / rounds - vector).norm() < lost * vector.norm()
    alone = decode_payload(codec, encode_payload(codec, vector), NUMEL)
    assert (arrived / rounds - vector).norm() < 0.85 * (alone - vector).norm(), "without feedback"


ANSWERS = st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=12)


@given(ANSWERS)
def test_a_refused_push_leaves_no_trace(answers: list[tuple[bool, int]]) -> None:
    """`answers`: what becomes of each push, and after how many more pushes that is heard."""
    feedback, payloads = ErrorFeedback(), dict[int, bytes]()
    heard_after = {seq: seq + later for seq, (_, later) in enumerate(answers, 1)}
    for seq in range(1, len(answers) + 1):
        payloads[seq] = pushed(feedback, seq)
        for other, at in heard_after.items():
            if at == seq:
                feedback.answered(other, answers[other - 1][0])
    residual = None
    for seq, (is_accepted, _) in enumerate(answers, 1):
        if is_accepted or heard_after[seq] > len(answers):
            left_out = delta_of(seq) - decode_payload("2bit", payloads[seq], NUMEL)
            residual = left_out if residual is None else torch.add(left_out, residual, alpha=DECAY)
    expected = delta_of(99) if residual is None else torch.add(delta_of(99), residual, alpha=DECAY)
    assert feedback.encode(delta_of(99), "2bit") == encode_payload("2bit", expected)


def test_an_answer_to_an_earlier_life_s_push_changes_nothing() -> None:
    feedback, other = ErrorFeedback(), ErrorFeedback()
    for seq, is_accepted in ((1, True), (2, False)):
        feedback.answered(seq, is_accepted)
    assert not feedback._answers, "what nobody waits for is not gathered"
    assert [pushed(feedback, seq) for seq in (7, 8)] == [pushed(other, seq) for seq in (7, 8)]


def test_what_is_answered_is_not_held_any_more() -> None:
    feedback = ErrorFeedback()
    for seq in range(1, 20):
        pushed(feedback, seq)
        feedback.answered(seq, seq % 3 > 0)
    pushed(feedback, 20)
    assert list(feedback._left_out) == [20]
    assert not feedback._accepted


# --- the next life ---


@given(ANSWERS, st.integers(1, 12))
def test_a_life_that_goes_on_from_what_was_kept_sends_what_the_first_would_have(
    answers: list[tuple[bool, int]], ends_after: int
) -> None:
    """The first life ends with some of its pushes unanswered; some are answered before the second one asks."""
    first, ends_after = ErrorFeedback(), min(ends_after, len(answers))
    heard: dict[int, bool] = {}
    for seq in range(1, ends_after + 1):
        pushed(first, seq)
        kept = {name: tensor.clone() for name, tensor in first.dump().items()}
        for other in range(1, seq + 1):
            if other not in heard and other + answers[other - 1][1] <= seq:
                heard[other] = answers[other - 1][0]
                first.answered(other, heard[other])
    second = ErrorFeedback()
    accepted = [seq for seq, is_accepted in heard.items() if is_accepted]
    unanswered = [seq for seq in range(1, ends_after + 1) if seq not in heard]
    second.load(kept, accepted, unanswered)
    for seq in range(ends_after + 1, ends_after + 4):
        assert pushed(second, seq) == pushed(first, seq)


def test_a_push_that_was_kept_and_never_saved_leaves_no_trace() -> None:
    first = ErrorFeedback()
    pushed(first, 1)
    first.answered(1, True)
    before = pushed(first, 2)
    kept = first.dump()  # and the life ends here, before push 2 is in the outbox
    second = ErrorFeedback()
    second.load(kept, accepted=[1], unanswered=[])
    assert pushed(second, 2) == before


def test_without_anything_left_out_there_is_nothing_to_keep() -> None:
    assert ErrorFeedback().dump() == {}
