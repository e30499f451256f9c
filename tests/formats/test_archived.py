"""Names of archived objects: read back as they were written, and a file is there only with all of its pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetero_async.formats import archived
from hetero_async.formats.archived import (
    CheckpointName,
    SegmentName,
    checkpoint_name,
    pieces,
    segment_name,
    whole_files,
)

HASHES = st.binary(min_size=16, max_size=16)
LSNS = st.integers(min_value=0, max_value=2**63)
TERMS = st.integers(min_value=1, max_value=10**9)
RUNS = st.from_regex(r"[a-z0-9][a-z0-9-]{0,31}", fullmatch=True)


@given(st.builds(SegmentName, run=RUNS, first_lsn=LSNS, lsn=LSNS, term=TERMS, chain=HASHES, file_hash=HASHES))
def test_a_segment_s_name_says_what_it_holds(name: SegmentName) -> None:
    assert segment_name(str(name)) == name
    assert checkpoint_name(str(name)) is None


@given(st.builds(CheckpointName, run=RUNS, lsn=LSNS, term=TERMS, chain=HASHES, manifest_hash=HASHES))
def test_a_checkpoint_s_name_says_what_it_holds(name: CheckpointName) -> None:
    assert checkpoint_name(f"{name}manifest.json") == checkpoint_name(f"{name}model.safetensors") == name
    assert segment_name(f"{name}manifest.json") is None


@pytest.mark.parametrize(
    "name", ["", "run/genesis", "run/log/", "run/log/1.log", "a/run/log/x.log", "run/checkpoints/1/"]
)
def test_other_names_are_nobody_s(name: str) -> None:
    assert segment_name(name) is checkpoint_name(name) is None


@given(st.integers(min_value=0, max_value=10 * archived.PIECE_BYTES))
def test_pieces_cover_a_file_exactly(size_bytes: int) -> None:
    found = list(pieces("run/x", size_bytes))
    assert [start for _, start, _ in found] == [index * archived.PIECE_BYTES for index in range(len(found))]
    assert sum(size for _, _, size in found) == size_bytes
    assert all(0 <= size <= archived.PIECE_BYTES for _, _, size in found)
    assert all(size for _, _, size in found) or size_bytes == 0
    names = [name for name, _, _ in found]
    assert whole_files(reversed(names)) == {"run/x": names}


def test_a_file_without_one_of_its_pieces_is_not_there() -> None:
    names = [name for name, _, _ in pieces("run/x", 3 * archived.PIECE_BYTES)]
    for missing in names:
        assert whole_files([name for name in names if name != missing]) == {}
    others = [name for name, _, _ in pieces("run/x", 2 * archived.PIECE_BYTES)]
    assert whole_files([*names[:2], others[1]]) == {}, "pieces of different cuts do not make a whole"
