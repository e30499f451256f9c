"""The state: what it comes to is the same however it is carried, and a log that contradicts itself is not believed."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetero_async.core.records import (
    Beacon,
    Dataset,
    Delta,
    Entry,
    Genesis,
    Joined,
    Leased,
    Left,
    Metric,
    Promoted,
    Published,
    Record,
    RunSettings,
    Settings,
    Stepped,
)
from hetero_async.core.state import NORMS_KEPT, PUBLISHES_KEPT, Contribution, State

SETTINGS = RunSettings(run="r", samples=64, max_staleness=2)
DELTA = Delta(
    worker="a", incarnation=1, seq=2, anchor_version=1, steps=4, ranges=((8, 16),), codec="int8", norm=1.5,
    payload_hash=b"2",
)  # fmt: skip
STEPPED = Stepped(version=2, deltas=(10,), weights=(1.0,), gain=0.7)
PUBLISHED = Published(number=2, version=1, codec="int8", merged=(("a", 1),))
STORY: tuple[Record, ...] = (
    Genesis(key="A", settings=SETTINGS, schema_hash=b"s", parameters_hash=b"p"),
    Dataset(samples=64, positions=64),
    Joined(worker="a", key="A", site="here", incarnation=1, kept=()),
    Joined(worker="b", key="B", site="there", incarnation=1, kept=()),
    Leased(worker="a", ranges=((0, 24),)),
    Leased(worker="b", ranges=((24, 32), (40, 48))),
    replace(DELTA, seq=1, anchor_version=0, ranges=((0, 8),), payload_hash=b"1"),
    Stepped(version=1, deltas=(7,), weights=(1.0,), gain=0.7),
    Published(number=1, version=1, codec="int8", merged=(("a", 1),)),
    replace(DELTA, worker="b", seq=1, ranges=((24, 32),)),
    Left(worker="b", reason="said bye"),
    Metric(worker="a", name="loss", value=0.1 + 0.2, version=1),
    Settings(settings=replace(SETTINGS, grace=0.5)),
)


def told(*records: Record, state: State | None = None) -> State:
    state = State() if state is None else state
    for record in records:
        state.fold(Entry(lsn=state.lsn + 1, term=state.term, record=record))
    return state


def carried(state: State) -> State:
    return State.load(json.loads(json.dumps(state.dump())))


@pytest.mark.parametrize("count", range(len(STORY) + 1))
def test_a_state_carried_through_json_is_equal_and_goes_on_the_same_way(count: int) -> None:
    straight = told(*STORY[:count])
    again = carried(straight)
    assert again == straight
    assert again.digest() == straight.digest()
    assert told(*STORY[count:], state=again).digest() == told(*STORY).digest()


def test_every_record_of_the_story_changes_the_digest() -> None:
    digests = {told(*STORY[:count]).digest() for count in range(len(STORY) + 1)}
    assert len(digests) == len(STORY) + 1


def test_what_the_story_comes_to() -> None:
    state = told(*STORY)
    assert (state.version, state.publish, state.active) == (1, 1, ["a"])
    assert state.ledger.free == ((32, 64),), "what left with b came back"
    assert state.ledger.trained == ((0, 8), (24, 32))
    assert list(state.pending) == [10]
    assert state.members["a"].merged_seq == 1
    assert state.metrics == {"loss": (0.30000000000000004, 1)}
    assert not state.is_trained


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (STORY[0], "genesis is the first record"),
        (Dataset(samples=64, positions=64), "opened once"),
        (Joined(worker="a", key="A", site="here", incarnation=3, kept=()), "grow by one"),
        (Joined(worker="a", key="A", site="here", incarnation=2, kept=((0, 4),)), "only free positions"),
        (Left(worker="b", reason="again"), "only an active worker leaves"),
        (Leased(worker="b", ranges=((50, 51),)), "only an active worker leases"),
        (Leased(worker="a", ranges=((20, 40),)), "only free positions"),
        (replace(DELTA, incarnation=2), "present life"),
        (replace(DELTA, worker="b"), "present life"),
        (replace(DELTA, seq=1), "once, in their order"),
        (replace(DELTA, anchor_version=2), "staler than the bound"),
        (replace(DELTA, ranges=((23, 25),)), "only leased positions"),
        (replace(DELTA, ranges=((0, 8),)), "only leased positions"),
        (replace(STEPPED, version=3), "versions grow by one"),
        (replace(STEPPED, deltas=(), weights=()), "merges something, each with its weight"),
        (replace(STEPPED, weights=()), "merges something, each with its weight"),
        (replace(PUBLISHED, number=3), "without gaps"),
        (replace(PUBLISHED, version=2), "present version"),
        (Promoted(term=1, server="b"), "terms only grow"),
        (Beacon(version=1, publish=1, model_hash=b"", state_hash=b"other"), "not the one that was logged"),
    ],
)
def test_a_record_that_contradicts_the_log_is_not_believed(record: Record, reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        told(record, state=told(*STORY))


@pytest.mark.parametrize(("lsn", "term"), [(len(STORY), 1), (len(STORY) + 2, 1), (len(STORY) + 1, 0)])
def test_a_gap_a_repetition_or_a_fallen_term_is_not_believed(lsn: int, term: int) -> None:
    with pytest.raises(AssertionError):
        told(*STORY).fold(Entry(lsn=lsn, term=term, record=DELTA))


def test_what_came_in_is_kept_by_key_whoever_holds_it() -> None:
    renewed = Joined(worker="a", key="B", site="moved", incarnation=2, kept=((8, 24),))
    state = told(*STORY, renewed, replace(DELTA, incarnation=2))
    assert state.members["a"].key == "B"
    assert state.contributions == {
        "A": Contribution(worker="a", site="here", lives=1, deltas=1, steps=4, samples=8),
        "B": Contribution(worker="a", site="moved", lives=2, deltas=2, steps=8, samples=16),
    }


def test_a_log_begins_with_its_genesis() -> None:
    with pytest.raises(AssertionError, match="begins with its genesis"):
        told(STORY[1])


@pytest.mark.parametrize("staleness", [0, 1, 2, 3])
def test_a_delta_beyond_the_bound_is_not_believed(staleness: int) -> None:
    state = told(*STORY)
    state.version = DELTA.anchor_version + staleness
    if staleness <= 2:
        told(DELTA, state=state)
    else:
        with pytest.raises(AssertionError, match="staler than the bound"):
            told(DELTA, state=state)


def test_deltas_of_a_worker_are_merged_once_and_in_their_order() -> None:
    state = told(*STORY, DELTA, replace(DELTA, seq=3, ranges=((16, 24),)))
    second, third = len(STORY) + 1, len(STORY) + 2
    told(replace(STEPPED, deltas=(10, third), weights=(0.5, 0.5)), state=state)
    with pytest.raises(AssertionError, match="merged once, in their order"):
        told(replace(STEPPED, version=3, deltas=(second,)), state=state)
    with pytest.raises(KeyError):
        told(replace(STEPPED, version=3, deltas=(10,)), state=state)


def test_a_beacon_with_the_right_hash_is_believed() -> None:
    state = told(*STORY)
    told(Beacon(version=1, publish=1, model_hash=b"", state_hash=state.digest()), state=state)


def test_what_is_kept_of_the_past_is_bounded() -> None:
    count = NORMS_KEPT + 10
    state = told(STORY[0], Dataset(samples=count, positions=count), STORY[2], Leased(worker="a", ranges=((0, count),)))
    for seq in range(count):
        told(replace(DELTA, seq=seq + 1, anchor_version=0, ranges=((seq, seq + 1),), norm=float(seq)), state=state)
    assert state.norms == [float(seq) for seq in range(10, count)]
    assert state.is_trained
    told(*(Published(number=number, version=0, codec="", merged=()) for number in range(1, 1100)), state=state)
    assert (len(state.publish_versions), min(state.publish_versions)) == (PUBLISHES_KEPT, 1100 - PUBLISHES_KEPT)


def test_publishes_are_in_common_with_a_server_up_to_the_takeover_that_ended_its_reign() -> None:
    state = told(*STORY)
    first = state.publish
    for term in (2, 4):
        state.fold(Entry(lsn=state.lsn + 1, term=term, record=Promoted(term=term, server="b")))
        published = Published(number=state.publish + 1, version=state.version, codec="", merged=())
        state.fold(Entry(lsn=state.lsn + 1, term=term, record=published))
    common = [state.common_publish(term) for term in (0, 1, 2, 3, 4, 5)]
    assert common == [first, first, first + 1, first + 1, first + 2, first + 2]
    assert State.load(state.dump()) == state


# --- two histories of one run ---


class History:
    """A log, down to the term of each record; `promotions` as its state would have them."""

    def __init__(self, terms: list[int]) -> None:
        self.terms = terms

    @property
    def state(self) -> State:
        firsts = [lsn for lsn in range(2, len(self.terms) + 1) if self.terms[lsn - 1] != self.terms[lsn - 2]]
        promotions = [(self.terms[lsn - 1], lsn) for lsn in firsts]
        return State(term=self.terms[-1], lsn=len(self.terms), promotions=promotions)


@st.composite
def runs(draw: st.DrawFn) -> list[History]:
    """Servers of one run: each takes over from a prefix of some log, in a term that nobody had before, and writes on;
    whoever follows it has a prefix of that."""
    logs = [History([1] * draw(st.integers(1, 6)))]
    for term in range(2, draw(st.integers(2, 7))):
        origin = draw(st.sampled_from(logs)).terms
        kept = draw(st.integers(1, len(origin)))
        logs.append(History(origin[:kept] + [term] * draw(st.integers(1, 4))))
        logs.append(History(logs[-1].terms[: draw(st.integers(1, len(logs[-1].terms)))]))
    return logs


@given(runs(), st.data())
def test_two_logs_agree_just_up_to_where_their_takeovers_say(logs: list[History], data: st.DataObject) -> None:
    """A term has one server, so a record is known by its number and term."""
    ours, theirs = data.draw(st.sampled_from(logs)), data.draw(st.sampled_from(logs))
    pairs = list(zip(ours.terms, theirs.terms, strict=False))
    common = next((lsn for lsn, (our, their) in enumerate(pairs) if our != their), len(pairs))
    told = ours.state.common_lsn(theirs.state.promotions)
    assert min(told, theirs.state.lsn) == common
    assert told <= ours.state.lsn
    assert min(theirs.state.common_lsn(ours.state.promotions), ours.state.lsn) == common
