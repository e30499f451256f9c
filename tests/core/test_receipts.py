"""What a worker can prove to a server that has lost its memory."""

from dataclasses import replace

import pytest

from hetero_async.core.messages import Hello
from hetero_async.core.receipts import Receipts
from hetero_async.core.state import Member, State

HELLO = Hello(
    run="r",
    software="0",
    schema_hash=b"s",
    last_seq=0,
    claims=(),
    device="cpu",
    dtype="fp32",
    life=b"1",
    acknowledged=2,
)


def receipts(last_seq: int | None, secret: bytes = b"s", term: int = 3) -> Receipts:
    members = {} if last_seq is None else {"a": Member(site="x", last_seq=last_seq)}
    return Receipts(secret, State(term=term, members=members))


PROVEN = replace(HELLO, receipt=receipts(2).ack("a", 2, 9).receipt)


@pytest.mark.parametrize(("last_seq", "kept"), [(None, 0), (0, 0), (1, 1)])
def test_a_log_that_ends_before_what_was_acknowledged_is_known(last_seq: int | None, kept: int) -> None:
    assert receipts(last_seq).lost("a", PROVEN) == (
        f"a has our word that its delta 2 is durable, and this log ends with its delta {kept}: "
        "it is an older copy, or the disk lost what it had written"
    )


@pytest.mark.parametrize("last_seq", [2, 3])
def test_a_log_that_has_it_is_whole(last_seq: int) -> None:
    assert receipts(last_seq).lost("a", PROVEN) == ""


@pytest.mark.parametrize(
    ("worker", "hello", "secret", "term"),
    [
        ("a", HELLO, b"s", 3),
        ("a", replace(HELLO, receipt=bytes(16)), b"s", 3),
        ("a", replace(PROVEN, acknowledged=3), b"s", 3),
        ("b", PROVEN, b"s", 3),  # another's
        ("a", PROVEN, b"t", 3),  # another server's, which may have been lost with its site
        ("a", PROVEN, b"s", 4),
    ],
)
def test_what_anybody_could_say_proves_nothing(worker: str, hello: Hello, secret: bytes, term: int) -> None:
    assert receipts(0, secret, term).lost(worker, hello) == ""
