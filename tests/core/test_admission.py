"""Every reason for which a delta is turned away, and the two ways in which it is not."""

from dataclasses import replace

import pytest

from hetero_async.core.admission import (
    EARLY_NORM_MAX,
    NORMS_BEFORE_GATE,
    STRIKES,
    Admitted,
    Cause,
    Duplicate,
    Facts,
    NotAdmitted,
    judge,
)
from hetero_async.core.messages import Push
from hetero_async.core.records import (
    Dataset,
    Delta,
    Entry,
    Genesis,
    Joined,
    Leased,
    Promoted,
    Published,
    Record,
    RunSettings,
    Stepped,
)
from hetero_async.core.state import State

GOOD = Push(
    incarnation=1,
    seq=2,
    anchor=2,
    anchor_term=1,
    steps=4,
    ranges=((8, 16),),
    codec="int8",
    payload_bytes=9,
    payload_hash=b"new",
)


def folded(state: State, *records: Record) -> State:
    for record in records:
        state.fold(Entry(lsn=state.lsn + 1, term=1, record=record))
    return state


@pytest.fixture
def state() -> State:
    """One worker, its first delta admitted (record 5) and merged, two publishes, two rounds of staleness allowed."""
    first = Delta(
        worker="w", incarnation=1, seq=1, anchor_version=0, steps=4, ranges=((0, 8),), codec="int8", norm=1.0,
        payload_hash=b"old",
    )  # fmt: skip
    return folded(
        State(),
        Genesis(
            key="W", settings=RunSettings(run="r", samples=64, max_staleness=2), schema_hash=b"", parameters_hash=b""
        ),
        Dataset(samples=64, positions=64),
        Joined(worker="w", key="W", site="s", incarnation=1, kept=()),
        Leased(worker="w", ranges=((0, 16),)),
        first,
        Stepped(version=1, deltas=(5,), weights=(1.0,), gain=0.7),
        Published(number=1, version=1, codec="int8", merged=(("w", 1),)),
        Published(number=2, version=1, codec="int8", merged=(("w", 1),)),
    )


def test_a_good_delta_is_admitted_with_the_version_of_its_anchor(state: State) -> None:
    assert judge(state, "w", GOOD, Facts(norm=1.0)) == Admitted(1)
    assert judge(state, "w", replace(GOOD, anchor=0), Facts(norm=1.0)) == Admitted(0)


def test_an_anchor_that_is_not_the_runs_counts_as_the_last_one_before_that_is(state: State) -> None:
    """The worker's server had made publishes 1 and 2 as well, and its successor did not know of them."""
    state.fold(Entry(lsn=state.lsn + 1, term=2, record=Promoted(term=2, server="b")))
    state.inherited = {2: 0}
    assert judge(state, "w", GOOD, Facts(norm=1.0)) == Admitted(0)
    assert judge(state, "w", replace(GOOD, anchor_term=2), Facts(norm=1.0)) == Admitted(1)
    state.version = 3
    assert isinstance(judge(state, "w", GOOD, Facts(norm=1.0)), NotAdmitted)


def test_the_same_delta_again_is_acknowledged_again_whatever_its_anchor_and_ranges(state: State) -> None:
    again = replace(GOOD, seq=1, payload_hash=b"old", ranges=((0, 8),), anchor=99)
    assert judge(state, "w", again, Facts(refusal=NotAdmitted("unreadable", Cause.UNREADABLE))) == Duplicate(5)


@pytest.mark.parametrize(
    ("change", "facts", "reason", "cause", "is_strike"),
    [
        ({"seq": 1}, Facts(), "delta 1 was already admitted with other bytes", Cause.REPLACED, True),
        ({"seq": 0}, Facts(), "delta 0 comes after delta 1 was admitted", Cause.LATE, False),
        ({}, Facts(refusal=NotAdmitted("not finite", Cause.INFINITE)), "not finite", Cause.INFINITE, True),
        ({"ranges": ()}, Facts(), "it covers no sample", Cause.EMPTY, True),
        ({}, Facts(norm=0.0, scale=1.0), "it claims steps (4) and moves nothing", Cause.IDLE, True),
        ({"steps": 0}, Facts(norm=1.0, scale=1.0), "it claims no step and moves the parameters", Cause.IDLE, True),
        ({"anchor": 3}, Facts(), "its anchor is publish 3, and the newest is 2", Cause.AHEAD, False),
        ({"anchor_term": 2}, Facts(), "its anchor is of term 2, and the newest is 1", Cause.AHEAD, False),
        ({"ranges": ((8, 17),)}, Facts(), "positions 16..16 are not leased to it", Cause.UNLEASED, False),
        ({"ranges": ((0, 8),)}, Facts(), "positions 0..7 are not leased to it", Cause.UNLEASED, False),
    ],
)
def test_what_is_wrong_with_it_is_said(
    state: State, change: dict[str, object], facts: Facts, reason: str, cause: Cause, is_strike: bool
) -> None:
    verdict = judge(state, "w", replace(GOOD, **change), facts)  # type: ignore[arg-type]
    assert verdict == NotAdmitted(reason, cause)
    assert (cause in STRIKES) == is_strike


def test_beyond_the_bound_it_is_too_stale_and_at_the_bound_it_is_not(state: State) -> None:
    for version, admitted in ((2, True), (3, False)):
        state.version = version
        verdict = judge(state, "w", replace(GOOD, anchor=0), Facts(norm=1.0))
        refusal = NotAdmitted("too stale: 3 versions behind, 2 allowed", Cause.STALE)
        assert verdict == (Admitted(0) if admitted else refusal)
        assert Cause.STALE not in STRIKES


def test_a_bound_in_rounds_counts_a_version_per_worker_where_each_push_steps(state: State) -> None:
    assert state.settings is not None
    assert state.staleness_bound() == 2
    state.settings = replace(state.settings, merge="per-push")
    folded(state, Joined(worker="v", key="V", site="s", incarnation=1, kept=()))
    assert state.staleness_bound() == 4


def test_the_norm_gate_opens_its_eyes_late_and_measures_against_the_median(state: State) -> None:
    huge = Facts(norm=21.0)
    state.norms = [1.0] * (NORMS_BEFORE_GATE - 1)
    assert judge(state, "w", GOOD, huge) == Admitted(1)
    state.norms = [1.0] * NORMS_BEFORE_GATE
    reason = "its norm 21 is more than 20 times the median 1"
    assert judge(state, "w", GOOD, huge) == NotAdmitted(reason, Cause.LONG)
    assert Cause.LONG in STRIKES
    assert judge(state, "w", GOOD, Facts(norm=20.0)) == Admitted(1)
    assert state.settings is not None
    state.settings = replace(state.settings, norm_gate=0.0)
    assert judge(state, "w", GOOD, huge) == Admitted(1)


def test_among_the_first_deltas_what_dwarfs_the_parameters_is_refused(state: State) -> None:
    at_the_bound, beyond = (Facts(norm=norm, scale=2.0) for norm in (2 * EARLY_NORM_MAX, 2.01 * EARLY_NORM_MAX))
    assert judge(state, "w", GOOD, at_the_bound) == Admitted(1)
    reason = "its norm 2.01e+03 is more than 1000 times the parameters' 2"
    assert judge(state, "w", GOOD, beyond) == NotAdmitted(reason, Cause.LONG)
    assert state.settings is not None
    state.settings = replace(state.settings, norm_gate=0.0)
    assert judge(state, "w", GOOD, beyond) == Admitted(1)


def test_rounds_that_honestly_moved_nothing_are_admitted_and_do_not_close_the_gate(state: State) -> None:
    """A warm-up that begins at a learning rate of zero: no step is claimed, and later deltas are no less welcome."""
    assert judge(state, "w", replace(GOOD, steps=0), Facts(norm=0.0, scale=1.0)) == Admitted(1)
    state.norms = [0.0] * 64
    assert judge(state, "w", GOOD, Facts(norm=1.0, scale=1.0)) == Admitted(1)
