"""A group's probe comes to what one process's does, however its parameters lie, and leaves every rank as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from e2e.tiny import seeded
from tensors.models import values
from tensors.ranks import on_ranks
from torch import Tensor, nn

from hetero_async.core.probing import distance
from hetero_async.probing import Probing
from hetero_async.tensors.control import Control, Kind
from hetero_async.tensors.replica import Replica
from hetero_async.tensors.schema import unwrapped
from hetero_async.tensors.torchrun import GroupReplica

BATCH = torch.arange(12).view(2, 6)


class Layered(nn.Module):
    """Layers whose parameters are their own, their parts' and tied ones, with buffers; `last` is sharded by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(13, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.memory = nn.LSTM(6, 6, batch_first=True)
        self.normal = nn.BatchNorm1d(6)
        self.last = nn.Linear(6, 13, bias=False)
        self.last.weight = self.table.weight
        self.deep = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))

    def forward(self, numbers: Tensor) -> Tensor:
        stream = self.table(numbers)
        stream = self.memory(self.attention(stream, stream, stream)[0])[0]
        return self.last(self.deep(self.normal(stream.transpose(1, 2)).transpose(1, 2)))


def made(kind: str) -> nn.Module:
    model = seeded(Layered)
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    within = torch.bfloat16 if kind == "mixed" else torch.float32
    fully_shard(model.deep[0], mp_policy=MixedPrecisionPolicy(within))
    fully_shard(model.deep, mp_policy=MixedPrecisionPolicy(within, output_dtype=torch.float32))
    fully_shard(model)
    return model


def probed(rank: int, kind: str) -> dict[str, Any]:
    """How far the figures are from one process's, by layers and by a batch, and whether anything was left behind."""
    model, alone = made(kind), seeded(Layered)
    group, single = GroupReplica(unwrapped(model), Control()), Replica(alone)
    shown = values(single.schema.numel, seed=1) / 4
    buffers = (torch.rand(6) + 1, torch.rand(6) + 1, torch.tensor([7]))
    before = [part.local.clone() for part in group._parts]
    found: dict[str, Any] = {}
    for name, batch in (("layers", None), ("batch", BATCH)):
        probing = Probing("here-0", model, group, batch)
        if rank == 0:
            report = probing.report(shown, buffers)
            expected = Probing("here-1", alone, single, batch).report(shown, buffers)
            assert report and expected and not report.reason, report
            ours, theirs = report.digest.outputs(), expected.digest.outputs()
            apart = max(distance(ours[layer], theirs[layer]) for layer in theirs)
            found[name] = [list(ours) == list(theirs), apart, report.digest.arithmetic]
        elif batch is not None:
            assert group.control.hear().kind is Kind.SHOWN
            probing.report(None, ())
    found["unchanged"] = all(torch.equal(part.local, own) for part, own in zip(group._parts, before, strict=True))
    model(BATCH).sum().backward()  # every rank can still train
    found["trains"] = all(parameter.grad is not None for parameter in model.parameters())
    return found


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_groups_probe_comes_to_what_one_processes_does(tmp_path: Path, kind: str) -> None:
    first, second = on_ranks(tmp_path, 2, probed, kind=kind)["probed"]
    for name in ("layers", "batch"):
        has_all, apart, arithmetic = first.pop(name)
        assert has_all
        assert apart < 1e-6
        assert arithmetic == "fp32"
    assert first == second == {"unchanged": True, "trains": True}


def test_layers_that_answer_in_another_dtype_than_they_keep_are_known_by_it(tmp_path: Path) -> None:
    found = on_ranks(tmp_path, 2, probed, kind="mixed")["probed"][0]
    assert found["layers"][2] == "fp32"
    _, apart, arithmetic = found["batch"]
    assert arithmetic == "bf16"
    assert 1e-5 < apart < 2**-6


def failing(rank: int) -> list[Any]:
    """A batch that the model does not take: it says so, and trains on one that it takes."""
    model = made("fsdp2")
    group = GroupReplica(model, Control())
    probing = Probing("here-0", model, group, torch.tensor([[99]]))
    if rank == 1:
        assert group.control.hear().kind is Kind.SHOWN
    report = probing.report(values(group.schema.numel, seed=1) if rank == 0 else None, ())
    model(BATCH).sum().backward()
    return [report.reason.partition(":")[0] if report else None, model.table.weight.grad is not None]


def test_a_batch_that_a_sharded_model_does_not_take(tmp_path: Path) -> None:
    assert on_ranks(tmp_path, 2, failing)["failing"] == [["IndexError", True]] * 2
