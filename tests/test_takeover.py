"""How a standby becomes the server: what it asks, what it refuses to do, and in which order it does the rest."""

from collections.abc import Mapping
from types import MappingProxyType

import pytest
import trio
import trio.testing

from hetero_async.core.messages import Confirm, Following, Position
from hetero_async.core.reign import Reign, Sighting
from hetero_async.core.replication import Durability
from hetero_async.core.standby import Heard, Standby, Stored
from hetero_async.core.state import State
from hetero_async.errors import WitnessAway
from hetero_async.takeover import Takeover, _own_term

LSN, TERM = 20, 2
Answers = Mapping[str, Position | None]


def at(lsn: int, term: int = TERM, last_term: int = TERM, is_granted: bool = True) -> Position:
    return Position(lsn=lsn, last_term=last_term, term=term, is_granted=is_granted)


class Ledger:
    """Fulfils ports.Witness as far as a claim goes, and ports.Observer: it keeps one reign and what it was told."""

    def __init__(self, reign: Reign | None = None, holder: str = "") -> None:
        self.reign, self.holder = reign, holder
        self.is_away = False
        self.told: list[tuple[str, dict[str, object]]] = []

    async def look(self) -> Sighting:
        if self.is_away:
            raise WitnessAway("no member answers")
        return Sighting(reign=self.reign, holder=self.holder)

    async def claim(self, before: Reign | None, after: Reign) -> bool:
        if before != self.reign or self.holder not in ("", after.server):
            return False
        self.reign, self.holder = after, after.server
        return True

    async def amend(self, before: Reign, after: Reign) -> bool:
        raise NotImplementedError

    async def renew(self) -> bool:
        raise NotImplementedError

    async def resign(self) -> None:
        raise NotImplementedError

    def event(self, name: str, **fields: object) -> None:
        self.told.append((name, fields))


class Scene:
    """A standby b that follows a server a, and another standby c."""

    def __init__(self, witness: Ledger | None = None, *, durability: str = "replicated", lsn: int = LSN) -> None:
        state = State(term=TERM, server="a", promotions=[(TERM, 6)], lsn=lsn)
        self.machine = Standby(name="b", run="demo", software="1", state=state, promised=0)
        self.machine.server = "a"
        rules = Durability(durability=durability, has_witness=witness is not None, lease_ms=1000)  # type: ignore[arg-type]
        self.told = Ledger()
        self.takeover = Takeover(machine=self.machine, witness=witness, rules=rules, observer=witness or self.told)
        self.asked: list[int] = []

    def at_word(self, first: Answers, then: Answers | None = None, *, in_spite: bool = False) -> list[str]:
        async def ask(term: int) -> Answers:
            self.asked.append(term)
            return first if term == 0 else (first if then is None else then)

        async def main() -> list[str]:
            with trio.fail_after(30):
                return await self.takeover.at_word(ask, in_spite=in_spite)  # type: ignore[arg-type]

        return trio.run(main)

    @property
    def has_begun(self) -> bool:
        assert self.takeover.begun.is_set() == (self.takeover.reign is not None)
        assert not self.takeover.begun.is_set() or self.machine.is_taking_over
        return self.takeover.begun.is_set()


# --- at the operator's word ---


@pytest.mark.parametrize(
    ("durability", "positions", "against"),
    [
        ("replicated", {"a": at(LSN), "c": at(LSN)}, ""),
        ("replicated", {"a": at(LSN), "c": at(5)}, ""),
        ("replicated", {"a": None, "c": at(LSN)}, ""),
        ("local", {"a": None, "c": at(LSN)}, "a cannot be asked: what it alone has written down would be lost"),
        ("replicated", {"a": None, "c": None}, "c cannot be asked: what it alone has confirmed would be lost"),
        ("replicated", {"a": None, "c": at(LSN + 3)}, "c has 3 more records: promote that one instead"),
        ("local", {"a": at(LSN), "c": at(2, last_term=3)}, "c has records of term 3: promote that one instead"),
    ],
)
def test_what_would_be_lost_stands_against_it(durability: str, positions: Answers, against: str) -> None:
    scene = Scene(durability=durability)
    lines = scene.at_word(positions)
    if not against:
        assert lines == [] and scene.has_begun
        return
    assert against in lines[0] and len(lines) == 1
    assert not scene.has_begun
    assert scene.asked == [0], "nobody was told of a term"
    assert scene.at_word(positions, in_spite=True) == []
    assert scene.has_begun


def test_a_standby_without_records_takes_nothing_over_whatever_is_said() -> None:
    scene = Scene(lsn=0)
    assert scene.at_word({"a": None}, in_spite=True) == [
        "this standby holds no record yet: there is nothing to take over"
    ]
    assert not scene.has_begun


def test_its_term_is_above_every_one_that_anybody_knows() -> None:
    scene = Scene()
    assert scene.at_word({"a": at(LSN), "c": at(LSN, term=7)}) == []
    assert scene.asked == [0, 10]
    assert scene.takeover.reign == Reign(term=10, server="b")


@pytest.mark.parametrize("known", range(2, 9))
def test_of_nodes_that_are_promoted_apart_each_begins_a_term_of_its_own(known: int) -> None:
    terms = [_own_term(known, name, {"a", "b", "c"} - {name}) for name in "abc"]
    assert sorted(terms) == [known + 1, known + 2, known + 3]


def test_a_term_that_was_granted_to_another_is_not_taken() -> None:
    scene = Scene()
    everybody = {"a": at(LSN), "c": at(LSN)}
    lines = scene.at_word(everybody, {**everybody, "c": at(LSN, is_granted=False)})
    assert lines == ["c has granted term 4 to another: try again"]
    assert not scene.has_begun and not scene.machine.is_taking_over


def test_the_last_records_of_a_server_that_hands_over_come_first() -> None:
    scene = Scene()
    reigned_at: list[int] = []

    async def ask(term: int) -> Answers:
        return {"a": at(LSN + 2), "c": at(LSN)}

    async def deliver() -> None:
        await trio.sleep(0.2)
        assert not scene.has_begun and not scene.machine.is_taking_over
        scene.machine.step(Heard(now_ms=0, server="a", term=TERM, message=Following(lsn=LSN + 2, partner="")))
        scene.machine.step(Stored(now_ms=0, lsn=LSN + 2, last_term=TERM))
        assert scene.machine.ready().messages == [Confirm(term=TERM, lsn=LSN + 2)], "so that the server lets go"

    async def main() -> None:
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(deliver)
                assert await scene.takeover.at_word(ask, in_spite=False) == []  # type: ignore[arg-type]
                reigned_at.append(scene.machine.lsn)

    trio.run(main)
    assert reigned_at == [LSN + 2]


@pytest.mark.parametrize(
    ("reign", "against"),
    [
        (Reign(term=TERM, server="a", partner="b"), ""),
        (Reign(term=TERM, server="b"), ""),
        (Reign(term=TERM, server="a", partner="c"), "the witness knows c to have all that was acknowledged"),
        (Reign(term=TERM, server="a"), "the witness knows no standby to have all that was acknowledged"),
        (None, ""),
    ],
)
def test_the_witness_knows_who_has_everything(reign: Reign | None, against: str) -> None:
    witness = Ledger(reign)
    scene = Scene(witness)
    assert scene.at_word({"a": None, "c": None}) == ([against] if against else [])
    assert scene.has_begun == (not against)
    assert witness.reign == (reign if against else scene.takeover.reign)


def test_it_reigns_above_the_witness_s_term_too() -> None:
    witness = Ledger(Reign(term=12, server="a", partner="b"))
    scene = Scene(witness)
    assert scene.at_word({"a": at(LSN), "c": at(LSN)}) == []
    assert scene.takeover.reign == witness.reign == Reign(term=13, server="b")


def test_a_server_that_holds_the_lease_keeps_its_place_even_from_the_operator() -> None:
    scene = Scene(Ledger(Reign(term=TERM, server="a", partner="b"), holder="a"))
    lines = scene.at_word({"a": None, "c": None}, in_spite=True)
    assert lines == ["the witness says that a still serves: stop that one first"]
    assert not scene.has_begun and not scene.machine.is_taking_over


# --- by itself ---


def watched(scene: Scene, seconds: float, others: Answers = MappingProxyType({})) -> None:
    async def ask(term: int) -> dict[str, Position | None]:
        return dict(others)

    async def main() -> None:
        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(scene.takeover.watch, ask)
                await scene.takeover.begun.wait()
                nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_it_takes_a_vacant_place_by_itself() -> None:
    witness = Ledger(Reign(term=TERM, server="a", partner="b"))
    scene = Scene(witness)
    watched(scene, 10)
    assert scene.has_begun
    assert scene.takeover.reign == witness.reign == Reign(term=3, server="b")
    assert ("takes over", {"term": 3, "lsn": LSN}) in witness.told


@pytest.mark.parametrize(
    ("witness", "why"),
    [
        (Ledger(Reign(term=TERM, server="a", partner="b"), holder="a"), ""),
        (Ledger(), ""),
        (
            Ledger(Reign(term=TERM, server="a", partner="c")),
            "the witness does not know that this standby has all that was acknowledged",
        ),
    ],
)
def test_it_takes_no_place_that_is_not_vacant_or_not_for_it_and_says_once_why(witness: Ledger, why: str) -> None:
    scene = Scene(witness)
    watched(scene, 10)
    assert not scene.has_begun and not scene.machine.is_taking_over
    assert witness.told == ([("not taking over", {"reason": why})] if why else [])


@pytest.mark.parametrize(
    ("others", "begins"),
    [
        ({}, True),
        ({"a": None, "c": at(LSN)}, True),
        ({"c": at(LSN + 1, last_term=TERM - 1)}, True),
        ({"a": None, "c": at(LSN + 1)}, False),
        ({"c": at(LSN - 1, last_term=TERM + 1)}, False),
    ],
)
def test_it_goes_on_with_its_own_reign_unless_another_has_more_of_it(others: Answers, begins: bool) -> None:
    witness = Ledger(Reign(term=TERM, server="b"))
    scene = Scene(witness)
    watched(scene, 10, others)
    assert scene.has_begun == begins
    told = [("takes over", {"term": TERM, "lsn": LSN})]
    refused = [("not taking over", {"reason": "c has more of this reign than this disk has kept"})]
    assert witness.told == (told if begins else refused)
    assert scene.machine.is_taking_over == begins


def test_its_own_reign_goes_on_above_a_term_that_was_promised_to_one_whose_attempt_failed() -> None:
    scene = Scene(Ledger(Reign(term=TERM, server="b", partner="c")))
    watched(scene, 10, {"a": None, "c": at(LSN, term=TERM + 3)})
    assert scene.takeover.reign == Reign(term=TERM + 4, server="b")


def test_it_looks_again_when_the_witness_is_back() -> None:
    witness = Ledger(Reign(term=TERM, server="a", partner="b"))
    witness.is_away = True
    scene = Scene(witness)
    watched(scene, 10)
    assert not scene.has_begun
    assert witness.told == [("not taking over", {"reason": "no member answers"})]
    witness.is_away = False
    watched(scene, 10)
    assert scene.has_begun


def test_a_claim_that_somebody_else_won_is_given_up() -> None:
    class Beaten(Ledger):
        async def claim(self, before: Reign | None, after: Reign) -> bool:
            self.reign, self.holder = Reign(term=after.term, server="c"), "c"
            return await super().claim(before, after)

    scene = Scene(Beaten(Reign(term=TERM, server="a", partner="b")))
    watched(scene, 10)
    assert not scene.has_begun
    assert not scene.machine.is_taking_over, "it may confirm to c from now on"
