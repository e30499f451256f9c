"""However many deltas a merge has and wherever they lie until then, it comes to the same bits."""

from pathlib import Path

import pytest
import torch
from tensors.models import Flat, Run, values

from hetero_async.core.records import RunSettings
from hetero_async.shell.shelf import FileShelf
from hetero_async.tensors import model
from hetero_async.tensors.codecs.codec import PIECE
from hetero_async.tensors.model import ServerModel

NUMEL = 2 * PIECE + 33


def merged(run: Run, count: int) -> torch.Tensor:
    for number in range(count):
        run.push(values(NUMEL, seed=number), ("int4", "fp32", "int8")[number % 3])
    run.step(weights=[1 / (2 + number) for number in range(count)])
    return run.server.theta


@pytest.mark.parametrize("count", [1, 4, 5, 8, 11])
def test_a_merge_opens_a_few_at_a_time_to_the_same_bits(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    few = merged(Run(Flat(NUMEL)), count)
    monkeypatch.setattr(model, "MERGED_AT_ONCE", 100)
    assert torch.equal(few, merged(Run(Flat(NUMEL)), count))


def test_deltas_on_a_shelf_are_merged_and_kept_in_checkpoints_like_those_in_memory(tmp_path: Path) -> None:
    run = Run(Flat(NUMEL), RunSettings(run="test"))
    for number in range(3):
        run.push(values(NUMEL, seed=number), "int4")
    shelved = ServerModel(FileShelf(tmp_path))
    for entry in run.entries:
        shelved.apply(entry)
    again = ServerModel(FileShelf(tmp_path))
    again.load(shelved.snapshot())
    run.step()
    run.publish("int8")
    for entry in run.entries[-2:]:
        shelved.apply(entry)
        again.apply(entry)
    assert shelved.model_hash() == again.model_hash() == run.server.model_hash()
