"""Messages wait for the record that they speak of."""

from hetero_async.core.events import Outgoing
from hetero_async.core.messages import Ack, Wait
from hetero_async.core.post import Post

WAIT = Wait(reason="not yet")


def ack(seq: int) -> Ack:
    return Ack(seq=seq, lsn=10 * seq)


def test_what_needs_no_record_leaves_at_once_and_once() -> None:
    post = Post()
    post.send("a", WAIT)
    assert post.take(0) == (Outgoing("a", WAIT),)
    assert post.take(10) == ()


def test_what_speaks_of_a_record_leaves_when_that_is_released_in_the_order_of_sending() -> None:
    post = Post()
    post.send_of(5, "a", ack(1))
    post.send_of(3, "b", ack(1))
    post.send_of(4, "a", ack(2))
    assert post.take(2) == ()
    post.send("c", WAIT)
    assert post.take(4) == (Outgoing("c", WAIT), Outgoing("b", ack(1)), Outgoing("a", ack(2)))
    assert post.take(4) == ()
    assert post.take(5) == (Outgoing("a", ack(1)),)


def test_what_is_said_again_while_it_waits_leaves_once_and_as_early_as_it_would_have() -> None:
    post = Post()
    for lsn in (5, 6, 7):
        post.send_of(lsn, "a", ack(1))
    assert post.take(5) == (Outgoing("a", ack(1)),)
    assert post.take(9) == ()
    post.send_of(9, "a", ack(1))
    assert post.take(9) == (Outgoing("a", ack(1)),), "and again when it is asked for again"
