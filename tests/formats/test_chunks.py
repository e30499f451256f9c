"""An object crosses in pieces, whatever is lost, repeated or reordered on the way."""

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from hetero_async.errors import PeerError
from hetero_async.formats.chunks import CHUNK_BYTES, Assembly, chunk_count, slice_chunk

BLOB = bytes(range(256)) * (5 * CHUNK_BYTES // 256) + b"the last, short chunk"


def assembly_of(blob: bytes) -> Assembly:
    return Assembly(len(blob), xxhash.xxh3_128_digest(blob), limit=len(blob))


def indexes(runs: list[tuple[int, int]]) -> list[int]:
    return [index for first, count in runs for index in range(first, first + count)]


def test_what_is_asked_for_and_sent_makes_the_object() -> None:
    assembly = assembly_of(BLOB)
    while runs := assembly.wanted():
        for index in indexes(runs):
            assembly.add(index, bytes(slice_chunk(BLOB, index)))
    assert assembly.complete
    assert assembly.result() == BLOB


@pytest.mark.parametrize(
    ("total_bytes", "count"), [(0, 0), (1, 1), (CHUNK_BYTES, 1), (CHUNK_BYTES + 1, 2), (len(BLOB), 6)]
)
def test_chunks_are_counted(total_bytes: int, count: int) -> None:
    assert chunk_count(total_bytes) == count


def test_an_empty_object_is_complete_at_once() -> None:
    assembly = assembly_of(b"")
    assert assembly.complete
    assert assembly.wanted() == []
    assert assembly.result() == b""
    with pytest.raises(PeerError, match="chunk 0"):
        assembly.add(0, b"")


def test_no_more_than_the_credits_are_under_way() -> None:
    assembly = assembly_of(BLOB)
    assert assembly.wanted(2) == [(0, 2)]
    assert assembly.wanted(2) == []
    assembly.add(1, bytes(slice_chunk(BLOB, 1)))
    assert assembly.wanted(2) == [(2, 1)]
    assert assembly.wanted(4) == [(3, 2)]


def test_after_a_broken_connection_only_missing_chunks_are_asked_for() -> None:
    assembly = assembly_of(BLOB)
    assembly.wanted(4)
    for index in (0, 2):
        assembly.add(index, bytes(slice_chunk(BLOB, index)))
    assembly.lost()
    assert assembly.wanted(2) == [(1, 1), (3, 1)]


def test_a_chunk_that_arrives_after_all_is_not_asked_for_again() -> None:
    assembly = assembly_of(BLOB)
    assembly.wanted(1)
    assembly.lost()
    assembly.add(0, bytes(slice_chunk(BLOB, 0)))
    assert assembly.wanted(1) == [(1, 1)]


def test_a_second_copy_is_ignored_whatever_it_holds() -> None:
    assembly = assembly_of(BLOB)
    for index in range(6):
        assembly.add(index, bytes(slice_chunk(BLOB, index)))
    assembly.add(3, bytes(CHUNK_BYTES))
    assert assembly.result() == BLOB


@pytest.mark.parametrize(
    ("index", "length"), [(-1, CHUNK_BYTES), (6, CHUNK_BYTES), (0, 0), (0, 7), (0, CHUNK_BYTES + 1), (5, CHUNK_BYTES)]
)
def test_a_chunk_that_the_object_has_not_is_refused(index: int, length: int) -> None:
    assembly = assembly_of(BLOB)
    with pytest.raises(PeerError, match=f"chunk {index} "):
        assembly.add(index, bytes(length))
    assert indexes(assembly.wanted()) == list(range(6))


@pytest.mark.parametrize("total_bytes", [-1, 101, 2**62])
def test_an_object_over_the_limit_is_refused_before_any_memory_is_taken(total_bytes: int) -> None:
    with pytest.raises(PeerError, match="at most 100 are allowed"):
        Assembly(total_bytes, bytes(16), limit=100)


def test_an_object_with_another_hash_is_refused() -> None:
    assembly = Assembly(3, xxhash.xxh3_128_digest(b"abc"), limit=3)
    assembly.add(0, b"abd")
    with pytest.raises(PeerError, match="another hash"):
        assembly.result()


@given(st.data())
def test_any_order_loss_and_repetition_ends_with_the_object(data: st.DataObject) -> None:
    assembly, here = assembly_of(BLOB), set[int]()
    under_way: list[int] = []
    while not assembly.complete:
        credits = data.draw(st.integers(1, 4))
        asked = indexes(assembly.wanted(credits))
        assert not here.intersection(asked)
        assert not set(under_way).intersection(asked)
        under_way += asked
        assert len(under_way) <= 4
        if not under_way or data.draw(st.booleans()):
            assembly.lost()
            under_way.clear()
            continue
        index = data.draw(st.sampled_from(under_way))
        under_way.remove(index)
        here.add(index)
        for _ in range(data.draw(st.integers(1, 2))):
            assembly.add(index, bytes(slice_chunk(BLOB, index)))
    assert assembly.result() == BLOB
