"""Which records may be spoken of: never one that a standby which might take over has not."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetero_async.core.replication import Durability, Replication

LEASE_MS = 1000
LOCAL = Durability(durability="local", lease_ms=LEASE_MS)
REPLICATED = Durability(durability="replicated", lease_ms=LEASE_MS)
WITNESSED = Durability(durability="replicated", has_witness=True, lease_ms=LEASE_MS)
CONTINUING = Durability(durability="replicated", when_alone="continue", has_witness=True, lease_ms=LEASE_MS)
LOCAL_WITNESSED = Durability(durability="local", has_witness=True, lease_ms=LEASE_MS)


def level(replication: Replication, standby: str, lsn: int, now_ms: int = 0) -> None:
    """It has all that there was when it spoke the time before."""
    replication.confirm(standby, lsn, lsn, now_ms)
    replication.confirm(standby, lsn, lsn, now_ms)


def test_locally_all_that_is_durable_here_is_released() -> None:
    assert Replication(LOCAL).release(0, 7) == 7


def test_without_a_witness_the_confirmation_of_any_standby_releases() -> None:
    replication = Replication(REPLICATED)
    assert replication.release(0, 9) == 0
    replication.confirm("b", 4, 9, 0)
    replication.confirm("c", 6, 9, 0)
    assert replication.release(0, 9) == 6


def test_with_a_witness_only_the_partner_s_confirmations_release() -> None:
    replication = Replication(WITNESSED)
    replication.witnessed("b", 10**9)
    replication.confirm("c", 9, 9, 0)
    assert replication.release(0, 9) == 0
    replication.confirm("b", 5, 9, 0)
    assert replication.release(0, 9) == 5


def test_a_confirmation_never_takes_one_back_and_nothing_is_released_that_is_not_there() -> None:
    replication = Replication(REPLICATED)
    replication.confirm("b", 8, 9, 0)
    replication.confirm("b", 3, 9, 0)
    assert replication.release(0, 6) == 6
    assert replication.release(0, 9) == 8
    assert replication.release(0, 2) == 8, "it never goes back"


@pytest.mark.parametrize(
    ("rules", "sure_until_ms", "is_heard", "released"),
    [
        (LOCAL, 0, False, 9),
        (LOCAL_WITNESSED, 0, False, 0),
        (LOCAL_WITNESSED, 5001, False, 9),
        (LOCAL_WITNESSED, 5000, False, 0),
        (LOCAL_WITNESSED, 0, True, 9),
        (CONTINUING, 5001, False, 9),
        (CONTINUING, 0, False, 0),
        (WITNESSED, 5001, False, 0),
    ],
)
def test_a_server_by_itself_releases_only_while_nobody_else_can_reign(
    rules: Durability, sure_until_ms: int, is_heard: bool, released: int
) -> None:
    replication = Replication(rules)
    replication.witnessed("", sure_until_ms)
    if is_heard:
        replication.confirm("b", 1, 9, 5000 - LEASE_MS + 1)
    assert replication.release(5000, 9) == released


@pytest.mark.parametrize(
    ("rules", "partner", "wanted"),
    [
        (REPLICATED, "", None),
        (WITNESSED, "", "b"),
        (WITNESSED, "c", "b"),
        (WITNESSED, "b", None),
        (LOCAL_WITNESSED, "c", "b"),
    ],
)
def test_a_standby_that_has_everything_takes_the_place_of_a_partner_that_is_away(
    rules: Durability, partner: str, wanted: str | None
) -> None:
    replication = Replication(rules)
    replication.witnessed(partner, 0)
    level(replication, "b", 4)
    assert replication.wanted_partner(0) == wanted


@pytest.mark.parametrize(
    ("rules", "wanted"), [(WITNESSED, None), (CONTINUING, ""), (LOCAL_WITNESSED, ""), (REPLICATED, None)]
)
def test_the_witness_forgets_a_partner_that_is_away_only_where_the_run_may_go_on_alone(
    rules: Durability, wanted: str | None
) -> None:
    replication = Replication(rules)
    replication.witnessed("b", 0)
    replication.confirm("b", 4, 4, 0)
    assert replication.wanted_partner(LEASE_MS - 1) is None
    assert replication.wanted_partner(LEASE_MS) == (None if rules is REPLICATED else wanted)


def test_one_that_lacks_a_released_record_is_no_partner() -> None:
    replication = Replication(WITNESSED)
    replication.witnessed("c", 0)
    replication.confirm("c", 9, 9, 0)
    assert replication.release(0, 9) == 9
    replication.confirm("b", 5, 5, LEASE_MS)
    replication.confirm("b", 8, 9, LEASE_MS)
    assert replication.wanted_partner(LEASE_MS) is None
    replication.confirm("b", 9, 9, LEASE_MS)
    assert replication.wanted_partner(LEASE_MS) == "b"


def holding_back() -> Replication:
    """By itself, and waiting for b, which is nearly there."""
    replication = Replication(CONTINUING)
    replication.witnessed("", 10**9)
    assert replication.release(0, 9) == 9
    replication.confirm("b", 5, 6, 0)
    replication.confirm("b", 7, 9, 0)
    assert replication.wanted_partner(0) is None
    return replication


def test_a_server_by_itself_holds_back_for_a_standby_that_is_nearly_there() -> None:
    """Otherwise one that releases as it writes would never find anybody who has all of it."""
    replication = holding_back()
    assert replication.release(0, 12) == 9, "it waits for b"
    replication.confirm("b", 12, 12, 1)
    assert replication.wanted_partner(1) == "b"
    assert replication.release(1, 14) == 12
    replication.witnessed("b", 10**9)
    assert replication.release(1, 14) == 12


def test_it_goes_on_holding_back_when_the_witness_says_again_that_it_is_by_itself() -> None:
    replication = holding_back()
    replication.witnessed("", 10**9)
    assert replication.release(0, 12) == 9, "it waits for b"


@pytest.mark.parametrize(("partner", "rules"), [("", CONTINUING), ("c", CONTINUING), ("c", WITNESSED)])
def test_until_it_knows_which_partner_is_on_record_both_must_confirm(partner: str, rules: Durability) -> None:
    replication, now_ms = Replication(rules), LEASE_MS
    replication.witnessed(partner, 10**9)
    level(replication, "c", 3, 0)
    level(replication, "b", 4, now_ms)
    assert replication.wanted_partner(now_ms) == "b"
    replication.witnessed(None, 10**9)
    replication.confirm("c", 6, 9, now_ms)
    assert replication.release(now_ms, 9) == 4, "b may be on record"
    replication.confirm("b", 9, 9, now_ms)
    assert replication.release(now_ms, 9) == (6 if partner else 9), "and so may the one before"
    replication.witnessed("b", 10**9)
    assert replication.release(now_ms, 9) == 9


def test_it_does_not_hold_back_any_more_when_that_standby_is_away() -> None:
    replication = holding_back()
    assert replication.wanted_partner(LEASE_MS) is None
    assert replication.release(LEASE_MS, 12) == 12


@pytest.mark.parametrize(
    ("rules", "partner", "heard_ms", "why"),
    [
        (REPLICATED, "", -LEASE_MS, "no standby is in reach"),
        (WITNESSED, "b", -LEASE_MS, "no standby is in reach"),
        (WITNESSED, "b", 0, ""),
        (CONTINUING, "", -LEASE_MS, "the witness cannot be reached"),
        (LOCAL, "", -LEASE_MS, ""),
    ],
)
def test_it_says_why_acknowledgements_wait(rules: Durability, partner: str, heard_ms: int, why: str) -> None:
    replication = Replication(rules)
    replication.witnessed(partner, 0)
    replication.confirm("b", 3, 9, heard_ms)
    replication.release(0, 9)
    told = replication.why_held(0, 9)
    assert why in told and bool(told) == bool(why)


def test_the_log_is_kept_for_standbys_on_their_way_and_for_no_others() -> None:
    replication = Replication(REPLICATED)
    assert replication.keeps_from(9, 0) == 9
    replication.confirm("b", 3, 9, 0)
    replication.confirm("c", 6, 9, 5)
    assert replication.keeps_from(9, LEASE_MS - 1) == 3
    assert replication.keeps_from(9, LEASE_MS) == 6
    assert replication.keeps_from(9, LEASE_MS + 5) == 9


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(1, 3)),
        st.tuples(st.just("confirm"), st.sampled_from("bc"), st.integers(0, 3)),
        st.tuples(st.just("time"), st.integers(1, LEASE_MS)),
        st.tuples(st.just("witness"), st.booleans(), st.booleans()),
    ),
    max_size=60,
)


@given(STEPS, st.sampled_from([WITNESSED, CONTINUING]))
def test_whoever_the_witness_would_let_take_over_has_all_that_was_released(
    steps: list[tuple[object, ...]], rules: Durability
) -> None:
    """The witness's record is changed as the server wants it, or not, and the server hears of that, or not yet."""
    replication, lsn, now_ms = Replication(rules), 0, 0
    has = {"b": 0, "c": 0}
    partner, is_unsure = "", False
    replication.witnessed("", 0)
    for step in steps:
        match step:
            case ("write", int(count)):
                lsn += count
            case ("confirm", str(standby), int(lag)):
                has[standby] = max(has[standby], lsn - lag)
                replication.confirm(standby, has[standby], lsn, now_ms)
            case ("time", int(passed)):
                now_ms += passed
            case ("witness", bool(is_heard), _) if is_unsure:
                if is_heard:  # it looks before it wants anything else
                    replication.witnessed(partner, now_ms + LEASE_MS)
                    is_unsure = False
            case ("witness", bool(is_heard), bool(is_done)):
                wanted = replication.wanted_partner(now_ms)
                is_unsure = wanted is not None and not is_heard
                if wanted is not None and is_done:
                    partner = wanted
                replication.witnessed(None if is_unsure else partner, now_ms + LEASE_MS)
        before = replication.released
        assert before <= replication.release(now_ms, lsn) <= max(before, lsn)
        assert not partner or has[partner] >= replication.released


def test_the_order_in_which_standbys_speak_does_not_decide_who_is_partner() -> None:
    for order in itertools.permutations("bcd"):
        replication = Replication(WITNESSED)
        replication.witnessed("", 0)
        for standby in order:
            level(replication, standby, 4)
        assert replication.wanted_partner(0) == "b"
