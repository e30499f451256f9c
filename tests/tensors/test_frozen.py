"""A checkpoint shows the vectors as they were when it was taken, whatever is done to them while it is written."""

import itertools
from collections.abc import Iterator

import numpy
import pytest
import torch
from tensors.models import Run, eventful, values

from hetero_async.ports import ModelSnapshot
from hetero_async.tensors.codecs.codec import PIECE
from hetero_async.tensors.frozen import Frozen
from hetero_async.tensors.model import ServerModel

NUMEL = 3 * PIECE + 17


def read(frozen: Frozen) -> Iterator[bytes]:
    return (bytes(piece) for piece in frozen.pieces())


def test_what_is_read_is_the_vector_as_it_was() -> None:
    vector = values(NUMEL, seed=1)
    before = vector.numpy().tobytes()
    frozen = Frozen(vector)
    for start in range(0, NUMEL, PIECE):
        frozen.keep(start, min(start + PIECE, NUMEL))
        vector[start : start + PIECE] += 1
    assert b"".join(read(frozen)) == before


@pytest.mark.parametrize("read_before", range(5))
def test_blocks_that_were_read_are_not_copied_when_they_change(read_before: int) -> None:
    vector = values(NUMEL, seed=1)
    before = vector.numpy().tobytes()
    frozen = Frozen(vector)
    pieces = read(frozen)
    seen = list(itertools.islice(pieces, read_before))
    for start in range(0, NUMEL, PIECE):
        frozen.keep(start, min(start + PIECE, NUMEL))
        vector[start : start + PIECE] += 1
    assert len(frozen._kept) == 4 - min(4, read_before)
    assert b"".join([*seen, *pieces]) == before
    assert not frozen._kept


def test_a_model_goes_on_while_its_snapshot_is_read() -> None:
    run = eventful(NUMEL, "nesterov")
    snapshot = run.server.snapshot()
    parts = {name: read(array) for name, array in snapshot.arrays.items() if isinstance(array, Frozen)}
    assert parts.keys() == {"parameters", "momentum/0"}
    first = {name: next(pieces) for name, pieces in parts.items()}
    run.push(values(NUMEL, seed=5))
    run.step()
    run.publish("int8")
    assert run.server.model_hash() != snapshot.model_hash
    whole = {name: b"".join([first[name], *pieces]) for name, pieces in parts.items()}
    arrays = {**snapshot.arrays, **{name: numpy.frombuffer(data, numpy.float32) for name, data in whole.items()}}
    again = ServerModel()
    again.load(ModelSnapshot(arrays=arrays, model_hash=snapshot.model_hash))  # compares the hash
    assert again.model_hash() == snapshot.model_hash


def test_a_snapshot_that_nobody_has_any_more_costs_a_merge_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(torch.nn.Linear(3, 2))
    snapshot = run.server.snapshot()
    del snapshot
    monkeypatch.setattr(Frozen, "keep", lambda *_: pytest.fail("a block was kept for nobody"))
    run.push(values(8, seed=5))
    run.step()
