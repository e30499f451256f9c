"""What a server makes of those who follow it, ask it, or take its place."""

import pytest

from hetero_async.core.events import Followed, Outgoing, Witnessed
from hetero_async.core.messages import Confirm, Cut, Fence, Follow, Following, Message, Redirect, Refused
from hetero_async.core.post import Post
from hetero_async.core.reign import Reign
from hetero_async.core.replication import Durability, Replication
from hetero_async.core.state import State
from hetero_async.core.succession import HANDOVER_MS, Succession

TERM, LSN = 4, 20
# Ours: term 2 from record 6 on, term 4 from record 11 on.
PROMOTIONS = [(2, 6), (4, 11)]


class Server:
    def __init__(self) -> None:
        self.state = State(term=TERM, server="a", promotions=list(PROMOTIONS), lsn=LSN)
        self.replication = Replication(Durability(durability="replicated", has_witness=True))
        self.post = Post()
        self.succession = Succession("a", "demo", self.state, self.replication, self.post)

    def hear(self, message: Message, now_ms: int = 0, standby: str = "b") -> list[Message]:
        self.succession.step(Followed(now_ms=now_ms, standby=standby, message=message))
        told = self.post.take(0)
        assert all(outgoing == Outgoing(standby, outgoing.message) for outgoing in told)
        return [outgoing.message for outgoing in told]


def follow(lsn: int, *promotions: tuple[int, int], run: str = "demo") -> Follow:
    terms, began = zip(*promotions, strict=True) if promotions else ((), ())
    return Follow(run=run, software="1", lsn=lsn, terms=terms, began=began)


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (follow(0), Following(lsn=LSN, partner="")),
        (follow(5), Following(lsn=LSN, partner="")),
        (follow(6), Cut(lsn=5)),
        (follow(10, (2, 6)), Following(lsn=LSN, partner="")),
        (follow(15, (2, 6)), Cut(lsn=10)),
        (follow(15, (2, 6), (3, 9)), Cut(lsn=8)),
        (follow(15, (2, 6), (3, 12)), Cut(lsn=10)),
        (follow(15, (2, 4)), Cut(lsn=3)),
        (follow(20, *PROMOTIONS), Following(lsn=LSN, partner="")),
        (follow(21, *PROMOTIONS[:1]), Cut(lsn=10)),
    ],
)
def test_who_follows_is_told_where_its_log_leaves_the_run_s(asked: Follow, answer: Message) -> None:
    server = Server()
    assert server.hear(asked) == [answer]
    assert not server.succession.is_under_way


@pytest.mark.parametrize("lsn", [5, LSN])
def test_who_has_another_record_in_the_same_place_is_refused_and_told_why(lsn: int) -> None:
    server = Server()
    asked = follow(lsn, *(began for began in PROMOTIONS if began[1] <= lsn))
    server.succession.step(Followed(now_ms=0, standby="b", message=asked, is_chained=False))
    (outgoing,) = server.post.take(0)
    assert isinstance(outgoing.message, Refused)
    assert f"record {lsn} of this log is another one in a's, of the same term" in outgoing.message.reason
    assert not server.succession.is_under_way


def test_where_the_histories_part_what_is_behind_is_cut_and_not_asked_about() -> None:
    server = Server()
    asked = Followed(now_ms=0, standby="b", message=follow(15, (2, 6)), is_chained=False)
    server.succession.step(asked)
    assert [outgoing.message for outgoing in server.post.take(0)] == [Cut(lsn=10)]


def test_another_run_s_standby_is_refused_for_good() -> None:
    (refused,) = Server().hear(follow(0, run="other"))
    assert isinstance(refused, Refused) and 'trains the run "demo", not "other"' in refused.reason


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (follow(21, *PROMOTIONS, (5, 21)), "b has records of term 5, and this is term 4"),
        (
            follow(21, *PROMOTIONS),
            "b has record 21 of this term and this log ends with record 20: "
            "what was durable here is lost, and b has it",
        ),
        (Redirect(server="c", term=5), "c has taken over, in term 5"),
    ],
)
def test_a_server_that_hears_of_a_higher_term_stops(message: Message, reason: str) -> None:
    server = Server()
    assert server.hear(message) == []
    assert server.succession.deposed == reason
    assert server.succession.is_under_way


@pytest.mark.parametrize("term", [3, TERM])
def test_it_does_not_stop_for_the_word_of_its_own_or_an_older_term(term: int) -> None:
    server = Server()
    assert server.hear(Redirect(server="c", term=term)) == []
    assert not server.succession.is_under_way


@pytest.mark.parametrize(
    ("confirm", "answers"),
    [
        (Confirm(term=TERM, lsn=LSN), [Following(lsn=LSN, partner="")]),
        (Confirm(term=TERM - 1, lsn=5), [Redirect(server="a", term=TERM)]),
        (Confirm(term=TERM + 1, lsn=5), [Redirect(server="a", term=TERM)]),
    ],
)
def test_only_confirmations_of_this_term_count(confirm: Confirm, answers: list[Message]) -> None:
    server = Server()
    server.hear(follow(LSN, *PROMOTIONS))
    assert server.hear(confirm) == answers
    assert list(server.replication.standings) == (["b"] if confirm == Confirm(term=TERM, lsn=LSN) else [])


def test_a_confirmation_counts_from_whom_this_process_has_found_to_have_the_same_log() -> None:
    """Joined to the process before, whose last records a disk may have lost, it may have others of these numbers."""
    server = Server()
    assert server.hear(Confirm(term=TERM, lsn=LSN)) == [Redirect(server="a", term=TERM)]
    assert not server.replication.standings
    server.hear(follow(LSN, *PROMOTIONS))
    server.hear(Confirm(term=TERM, lsn=LSN))
    assert list(server.replication.standings) == ["b"]


def test_a_confirmation_of_a_record_that_is_not_there_shows_that_a_disk_has_lost_it() -> None:
    server = Server()
    assert server.hear(Confirm(term=TERM, lsn=LSN + 1)) == []
    assert server.succession.deposed.startswith(f"b has record {LSN + 1} of this term and this log ends with")


@pytest.mark.parametrize(
    ("reign", "reason"),
    [
        (Reign(term=5, server="a"), "a has taken over, in term 5"),
        (Reign(term=TERM, server="b"), "b has taken over, in term 4"),
        (Reign(term=3, server="a", partner="b"), ""),
        (Reign(term=TERM, server="a", partner="b"), ""),
    ],
)
def test_the_witness_s_word_is_believed(reign: Reign, reason: str) -> None:
    server = Server()
    server.succession.step(Witnessed(now_ms=0, reign=reign))
    assert server.succession.deposed == reason


def test_a_server_hands_over_when_its_successor_has_everything() -> None:
    server = Server()
    fence = Fence(term=TERM + 1)
    server.hear(follow(LSN - 1, *PROMOTIONS))
    server.hear(fence)
    assert server.succession.is_under_way and not server.succession.deposed
    assert server.succession.position("b", fence).is_granted
    server.hear(Confirm(term=TERM, lsn=LSN - 1), now_ms=1)
    assert not server.succession.deposed
    server.hear(Confirm(term=TERM, lsn=LSN), now_ms=2)
    assert server.succession.deposed == "b takes over"


def test_a_successor_that_never_comes_is_not_waited_for_longer_than_said() -> None:
    server = Server()
    server.hear(Fence(term=TERM + 1), now_ms=7)
    server.succession.hand_over(7 + HANDOVER_MS)
    assert not server.succession.deposed
    server.succession.hand_over(8 + HANDOVER_MS)
    assert server.succession.deposed == "b takes over"


def test_it_hands_over_to_one_only() -> None:
    server = Server()
    fence = Fence(term=TERM + 1)
    server.hear(follow(LSN - 1, *PROMOTIONS))
    server.hear(fence)
    server.hear(fence, standby="c")
    assert server.succession.position("b", fence).is_granted
    assert not server.succession.position("c", fence).is_granted


@pytest.mark.parametrize(("term", "is_granted"), [(0, True), (1, False), (TERM, False)])
def test_a_question_changes_nothing_and_its_own_term_is_granted_to_nobody(term: int, is_granted: bool) -> None:
    server = Server()
    fence = Fence(term=term)
    server.hear(fence)
    position = server.succession.position("b", fence)
    assert (position.lsn, position.last_term, position.term, position.is_granted) == (LSN, TERM, TERM, is_granted)
    assert not server.succession.is_under_way
