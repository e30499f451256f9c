"""What a group's ranks are told that join or train differently, and what the group keeps of its optimizer."""

import os
import re
from pathlib import Path

import pytest
import torch
from e2e.groups import Uneven, wrapped
from e2e.tiny import Text, seeded
from tensors.ranks import on_ranks

import hetero_async as ha
from hetero_async import roster
from hetero_async.config import ENV_RUN, ENV_WORKER
from hetero_async.errors import HeteroAsyncError, UserError
from hetero_async.group import GroupSession
from hetero_async.group_inner import GroupInnerState
from hetero_async.tables import template
from hetero_async.tensors.control import Control, Kind, Said


def test_torchruns_ranks_must_know_of_one_another_before_they_join(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "7", "WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    model = torch.nn.Linear(1, 1)
    with pytest.raises(
        UserError, match=r"^torchrun started this process as rank 1 of 2: call torch\.distributed\.init_process_group"
    ):
        ha.join(model, torch.optim.SGD(model.parameters()))


def told_of_each(rank: int, place: str) -> list[str]:
    os.environ.pop(ENV_RUN, None)
    model = wrapped("ddp", seeded(Uneven))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    told = []

    def tell(error: HeteroAsyncError) -> None:
        told.append(str(error))

    for probe in (torch.zeros(2 + rank), torch.zeros(2)):
        try:
            GroupSession(model, optimizer, probe)
        except HeteroAsyncError as error:
            tell(error)
    if rank == 0:  # the other may be on a host where nothing of the run is known
        config = roster.initialize(Path(place) / "run", template(run={"name": "r", "samples": 9}, sites={"a": 1}))
        os.environ |= {ENV_RUN: str(config.path), ENV_WORKER: "a-0"}
    session = GroupSession(model, optimizer, None)
    told.append(session.worker)
    for samples, batch_size in ((100 + rank, 4), (100, 4 + rank), (7, 4)):
        try:
            next(session.batches(Text(samples), batch_size))
        except HeteroAsyncError as error:
            tell(error)
    session._control.bear(2)
    if rank == 0:
        session._control.say(Said(kind=Kind.STEPPED))
        session._group_replica.reset(torch.zeros(session._group_replica.schema.numel))  # a round has spoilt them
        session._control.say(Said(kind=Kind.DRAWN, positions=[5, 3]))
    else:
        try:
            session._draw_together()
        except HeteroAsyncError as error:
            tell(error)
        optimizer.state["anything"] = 1
        told += [
            str(session._draw_together()),
            str(len(optimizer.state)),
            str(float(sum(p.norm() for p in trained(model)))),
        ]
    return told


def trained(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def test_ranks_that_join_or_train_differently_are_told_so(tmp_path: Path) -> None:
    told, by_the_other = on_ranks(tmp_path, 2, told_of_each, place=str(tmp_path))["told_of_each"]
    assert re.fullmatch("the batch to probe with: .* on rank 0, .* on rank 1; it must be the same .*", told.pop(0))
    assert (
        told
        == by_the_other[1:6]
        == [
            f"{ENV_RUN} and {ENV_WORKER} are not set; "
            "start this script with: hetero-async work --site NAME -- python train.py",
            "a-0",
            "session.batches: 100 samples, 4 a batch, shared on rank 0, 101 samples, 4 a batch, shared on rank 1; "
            "it must be the same on every rank",
            "session.batches: 100 samples, 4 a batch, shared on rank 0, 100 samples, 5 a batch, shared on rank 1; "
            "it must be the same on every rank",
            "the dataset has 7 samples, fewer than one batch of 8",
        ]
    )
    out_of_step = (
        "rank 1 is at a batch while rank 0 is at an optimizer step: every rank must take the same batches and steps"
    )
    assert by_the_other[6:] == [out_of_step, "[5, 3]", "0", "0.0"]


# --- the inner optimizer ---


def stepped(kind: str, steps: int) -> torch.optim.Optimizer:
    model = wrapped(kind, seeded(Uneven))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        model(torch.arange(6).view(1, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def state_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    states = [optimizer.state.get(parameter, {}) for parameter in optimizer.param_groups[0]["params"]]
    values = [value for state in states for _, value in sorted(state.items())]
    return [value.to_local() if hasattr(value, "to_local") else value for value in values]


def lived_again(rank: int, kind: str, place: str) -> dict[str, object]:
    control, is_sharded = Control(), kind == "fsdp2"
    optimizer, again, anew = stepped(kind, 2), stepped(kind, 0), stepped(kind, 0)
    first, second, third = (
        GroupInnerState(one, Path(place), "a-0", control, is_sharded) for one in (optimizer, again, anew)
    )
    was_nothing_there = not second.restore()
    first.moment = 7
    if tensors := first.copy():
        first.write(tensors)
    torch.distributed.barrier()
    is_warm = second.restore()
    kept, expected = state_of(again), state_of(optimizer)
    is_same = len(kept) == len(expected) > 0 and all(map(torch.equal, kept, expected))
    first.moment += 1
    if rank == 1 and (tensors := first.copy()):
        first.write(tensors)  # and the other was killed before it had
    torch.distributed.barrier()
    is_warm_of_two_moments = third.restore()
    return {
        "nothing": was_nothing_there,
        "warm": is_warm,
        "same": is_same,
        "warm of two moments": is_warm_of_two_moments,
        "left": len(anew.state),
    }


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_group_goes_on_with_its_optimizers_state_or_no_rank_does(tmp_path: Path, kind: str) -> None:
    is_sharded = kind == "fsdp2"
    kept = {"nothing": True, "warm": True, "same": True, "warm of two moments": not is_sharded}
    lives = on_ranks(tmp_path, 2, lived_again, kind=kind, place=str(tmp_path / "kept"))
    for told in lives["lived_again"]:
        assert told.pop("left") == (0 if is_sharded else 3)
        assert told == kept
    names = ["optimizer-0-of-2.kept", "optimizer-1-of-2.kept"] if is_sharded else ["optimizer.kept"]
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == names
    said = (tmp_path / "rank-0.output").read_text()
    assert ("a-0: the optimizer begins anew: what the ranks have kept is not of one moment" in said) == is_sharded
