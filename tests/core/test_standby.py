"""A standby: what it confirms, to whom, whom it grants a term, and when it may reign."""

import pytest

from hetero_async.core.messages import Confirm, Cut, Fence, Follow, Following, Message, Redirect, Refused, Wait
from hetero_async.core.reign import Reign, Sighting
from hetero_async.core.standby import (
    CONFIRM_EVERY_MS,
    FOLLOW_EVERY_MS,
    TURN_EVERY_MS,
    Heard,
    Reconnected,
    Standby,
    Stored,
    Tick,
)
from hetero_async.core.state import State

LSN, TERM, LEASE_MS = 20, 2, 1000
PROMOTIONS = [(2, 6)]
ASKS = Follow(run="demo", software="1", lsn=LSN, terms=(2,), began=(6,))


def standby(lsn: int = LSN, promised: int = 0) -> Standby:
    state = State(term=TERM, server="a", promotions=list(PROMOTIONS), lsn=lsn)
    return Standby(name="b", run="demo", software="1", state=state, promised=promised)


def hear(machine: Standby, message: Message, now_ms: int = 0, term: int = TERM, server: str = "a") -> list[Message]:
    machine.step(Heard(now_ms=now_ms, server=server, term=term, message=message))
    return machine.ready().messages


def tick(machine: Standby, now_ms: int) -> list[Message]:
    machine.step(Tick(now_ms=now_ms))
    return machine.ready().messages


def joined(now_ms: int = 0) -> Standby:
    machine = standby()
    assert tick(machine, now_ms) == [ASKS]
    assert hear(machine, Following(lsn=25, partner="b"), now_ms) == []
    return machine


def test_it_follows_stores_and_confirms() -> None:
    machine = joined()
    assert (machine.server, machine.wanted, machine.lag, machine.partner) == ("a", LSN + 1, 5, "b")
    machine.step(Stored(now_ms=1, lsn=24, last_term=TERM))
    assert machine.ready().messages == [Confirm(term=TERM, lsn=24)]
    assert (machine.wanted, machine.lag) == (25, 1)


def test_it_asks_until_it_is_answered_and_confirms_as_a_heartbeat_then() -> None:
    machine = standby()
    assert tick(machine, 0) == [ASKS]
    assert tick(machine, FOLLOW_EVERY_MS - 1) == []
    assert tick(machine, FOLLOW_EVERY_MS) == [ASKS]
    hear(machine, Following(lsn=LSN, partner=""), FOLLOW_EVERY_MS)
    assert tick(machine, FOLLOW_EVERY_MS + CONFIRM_EVERY_MS - 1) == []
    assert tick(machine, FOLLOW_EVERY_MS + CONFIRM_EVERY_MS) == [Confirm(term=TERM, lsn=LSN)]


def test_it_asks_anew_on_a_new_connection() -> None:
    machine = joined()
    machine.step(Reconnected(now_ms=1))
    assert machine.ready().messages == [ASKS]
    assert machine.wanted is None


def test_it_does_not_ask_while_records_are_on_their_way_to_its_disk() -> None:
    machine = joined()
    machine.is_storing = True
    machine.step(Reconnected(now_ms=1))
    assert machine.ready().messages == [], "the answer would be about a log that ends elsewhere by then"
    machine.step(Stored(now_ms=2, lsn=22, last_term=TERM))
    assert machine.ready().messages == []
    (asks,) = tick(machine, FOLLOW_EVERY_MS)
    assert isinstance(asks, Follow) and asks.lsn == 22


def test_it_promises_a_term_before_a_word_of_it_is_said_and_asks_before_it_confirms_in_it() -> None:
    machine = joined()
    machine.step(Heard(now_ms=1, server="c", term=3, message=Redirect(server="c", term=3)))
    owed = machine.ready()
    assert (owed.promise, owed.turn) == (3, "c")
    machine.step(Stored(now_ms=2, lsn=22, last_term=TERM))
    assert machine.ready().messages == [], "what came from a cannot be confirmed to c"
    hear(machine, Following(lsn=30, partner=""), 3, term=3, server="c")
    machine.step(Stored(now_ms=4, lsn=23, last_term=3))
    assert machine.ready().messages == [Confirm(term=3, lsn=23)]


@pytest.mark.parametrize("message", [Following(lsn=9, partner=""), Cut(lsn=3), Wait(reason="-"), Refused(reason="-")])
def test_a_server_of_a_lower_term_is_told_that_its_reign_is_over(message: Message) -> None:
    machine = standby(promised=5)
    machine.step(Heard(now_ms=0, server="a", term=4, message=message))
    owed = machine.ready()
    assert owed.messages == [Redirect(server="", term=5)]
    assert (owed.cut, owed.turn, owed.promise, machine.refusal, machine.is_joined) == (None, None, 0, "", False)


def test_a_promise_survives_its_process() -> None:
    assert standby(promised=7).term == 7
    assert standby(promised=1).term == TERM


@pytest.mark.parametrize(
    ("message", "cut", "turn", "refusal"),
    [
        (Cut(lsn=12), 12, None, ""),
        (Cut(lsn=0), 0, None, ""),
        (Redirect(server="c", term=TERM), None, "c", ""),
        (Redirect(server="c", term=TERM - 1), None, None, ""),
        (Wait(reason="no server either"), None, "", ""),
        (Refused(reason="another run"), None, None, "another run"),
    ],
)
def test_it_does_as_it_is_told(message: Message, cut: int | None, turn: str | None, refusal: str) -> None:
    machine = standby()
    machine.step(Heard(now_ms=0, server="a", term=0, message=message))
    owed = machine.ready()
    assert (owed.cut, owed.turn, machine.refusal) == (cut, turn, refusal)


def test_it_does_not_turn_from_one_waiting_standby_to_the_next_without_a_pause() -> None:
    machine, turns = standby(), []
    for now_ms in range(0, 3 * TURN_EVERY_MS, 100):
        machine.step(Heard(now_ms=now_ms, server="c", term=0, message=Wait(reason="-")))
        turns += [now_ms] if machine.ready().turn == "" else []
    assert turns == [0, TURN_EVERY_MS, 2 * TURN_EVERY_MS]


# --- taking over ---


def test_from_when_it_takes_over_it_confirms_nothing() -> None:
    machine = joined()
    machine.is_taking_over = True
    machine.step(Stored(now_ms=1, lsn=24, last_term=TERM))
    assert machine.ready().messages == []
    assert tick(machine, 10_000) == []
    hear(machine, Following(lsn=30, partner=""), 10_001)
    assert machine.ready().messages == []
    assert machine.wanted is None


def test_a_term_is_granted_once_and_its_promise_made_first() -> None:
    machine = joined()
    assert machine.fence(Fence(term=3), "c").is_granted
    assert machine.ready().promise == 3
    assert (machine.wanted, machine.server) == (None, ""), "no other server is followed from here on"
    assert machine.fence(Fence(term=3), "c").is_granted, "asked again by the same one"
    assert not machine.fence(Fence(term=3), "d").is_granted
    assert not machine.fence(Fence(term=TERM), "d").is_granted
    assert machine.fence(Fence(term=4), "d").is_granted


def test_a_term_that_it_wants_itself_is_granted_to_nobody_else() -> None:
    machine = joined()
    machine.vow(5)
    assert not machine.fence(Fence(term=5), "c").is_granted
    assert machine.ready().promise == 0
    assert machine.fence(Fence(term=6), "c").is_granted


def test_a_question_is_answered_and_changes_nothing() -> None:
    machine = joined()
    position = machine.fence(Fence(term=0), "c")
    assert (position.lsn, position.last_term, position.term, position.is_granted) == (LSN, TERM, TERM, True)
    assert machine.ready().promise == 0
    assert machine.is_joined


@pytest.mark.parametrize(
    ("sighting", "claimed"),
    [
        (Sighting(reign=None), None),
        (Sighting(reign=Reign(term=2, server="a", partner="b"), holder="a"), None),
        (Sighting(reign=Reign(term=2, server="a", partner="b")), Reign(term=3, server="b")),
        (Sighting(reign=Reign(term=9, server="a", partner="b")), Reign(term=10, server="b")),
        (Sighting(reign=Reign(term=2, server="a", partner="c")), None),
        (Sighting(reign=Reign(term=2, server="a")), None),
        (Sighting(reign=Reign(term=1, server="a", partner="b")), None),
        (Sighting(reign=Reign(term=2, server="b")), Reign(term=2, server="b")),
        (Sighting(reign=Reign(term=1, server="b")), None),
    ],
)
def test_it_claims_the_place_only_when_that_is_vacant_and_the_witness_knows_that_it_has_everything(
    sighting: Sighting, claimed: Reign | None
) -> None:
    assert standby().claim(sighting, 0, LEASE_MS) == claimed


def test_it_claims_above_every_term_that_it_promised() -> None:
    vacant = Sighting(reign=Reign(term=2, server="a", partner="b"))
    assert standby(promised=6).claim(vacant, 0, LEASE_MS) == Reign(term=7, server="b")
    begun = Sighting(reign=Reign(term=2, server="b"))
    assert standby(promised=6).claim(begun, 0, LEASE_MS) is None, "that reign of its own was overtaken"


def test_it_claims_nothing_while_it_hears_the_server_or_holds_nothing() -> None:
    vacant = Sighting(reign=Reign(term=2, server="a", partner="b"))
    machine = joined(now_ms=100)
    assert machine.claim(vacant, 100 + LEASE_MS - 1, LEASE_MS) is None
    assert machine.claim(vacant, 100 + LEASE_MS, LEASE_MS) == Reign(term=3, server="b")
    assert standby(lsn=0).claim(vacant, 0, LEASE_MS) is None
