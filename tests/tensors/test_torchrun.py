"""A group's parameters move as one process's do, to the bit, however they lie on its ranks; and ranks that do not fit
together are told so."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from e2e.groups import Uneven, wrapped
from e2e.tiny import seeded
from tensors.models import values
from tensors.ranks import on_ranks
from torch import nn
from torch.distributed.tensor import DTensor

from hetero_async.errors import PeerError
from hetero_async.tensors import control
from hetero_async.tensors.control import Control, Kind, Said
from hetero_async.tensors.replica import Replica
from hetero_async.tensors.schema import unwrapped
from hetero_async.tensors.torchrun import GroupReplica, whole

Script = Callable[[int], Any]
Told = dict[str, list[Any]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Model(nn.Module):
    """Shapes that two and three ranks cannot share evenly, a tied and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 5)
        self.image = nn.Conv2d(2, 4, 3)
        self.row = nn.Parameter(torch.ones(1, 5))
        self.frozen = nn.Linear(5, 3).requires_grad_(False)
        self.out = nn.Linear(5, 7, bias=False)
        self.out.weight = self.table.weight
        self.register_buffer("count", torch.tensor([3.0]))


def made(kind: str, dtype: str = "fp32", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = Model().to(DTYPES[dtype])
    if kind == "ddp":
        model.image.to(memory_format=torch.channels_last)
        return nn.parallel.DistributedDataParallel(model)
    if kind in ("fsdp2", "hsdp"):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        size = torch.distributed.get_world_size()
        shape, names = ((2, size // 2), ("replicate", "shard")) if kind == "hsdp" else ((size,), ("shard",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        fully_shard(model, mesh=mesh)
    return model


@torch.no_grad()
def stepped(model: nn.Module, seed: int) -> None:
    """What an optimizer does whose gradients were averaged: the same on every rank, each to its part."""
    for number, parameter in enumerate(unwrapped(model).parameters()):
        if parameter.requires_grad:
            step = 0.1 * values(parameter.numel(), seed + number).view(parameter.shape).to(parameter.dtype)
            if isinstance(parameter, DTensor):
                step = torch.distributed.tensor.distribute_tensor(step, parameter.device_mesh, parameter.placements)
            parameter.sub_(step)


def flat(model: nn.Module) -> torch.Tensor:
    trained = [whole(p.detach()) for p in unwrapped(model).parameters() if p.requires_grad]
    return torch.cat([p.float().reshape(-1) for p in trained])


def joined(kind: str, dtype: str = "fp32") -> tuple[nn.Module, GroupReplica]:
    model = made(kind, dtype)
    return model, GroupReplica(unwrapped(model), Control())


def move(group: GroupReplica, name: str, *target: torch.Tensor) -> Any:
    """On rank 0 as on a Replica; the others hear what it is, and have no target."""
    if group.control.rank == 0:
        return getattr(group, name)(*target)
    said = group.control.hear()
    assert said.kind is Kind[name.upper()]
    return getattr(group, name)(*(None for _ in target))


def lived_through(rank: int, kind: str) -> list[str]:
    return [differing for dtype in DTYPES for differing in differences(rank, kind, dtype)]


def differences(rank: int, kind: str, dtype: str) -> list[str]:
    """From a worker of one process that goes through the same."""
    model, group = joined(kind, dtype)
    alone = made("alone", dtype)
    single = Replica(alone)
    differing = []
    for number, name in enumerate(["reset", "cut", "adopt", "adopt", "cut", "reset", "cut"]):
        stepped(model, seed=10 * number)
        stepped(alone, seed=10 * number)
        target = [] if name == "cut" else [values(single.schema.numel, seed=number)]
        delta, expected = move(group, name, *target), getattr(single, name)(*target)
        if name == "cut" and rank == 0 and not torch.equal(delta, expected):
            differing.append(f"{dtype} {number}: the delta")
        if not torch.equal(flat(model), flat(alone)):
            differing.append(f"{dtype} {number}: the parameters after {name}")
    return differing


@pytest.mark.parametrize(("kind", "size"), [("ddp", 2), ("fsdp2", 3), ("hsdp", 4)])
def test_a_groups_parameters_move_as_one_processes_do(tmp_path: Path, kind: str, size: int) -> None:
    assert on_ranks(tmp_path, size, lived_through, kind=kind) == {"lived_through": [[]] * size}


@torch.no_grad()
def evaluated(rank: int) -> bool:
    """Whether a forward pass computes with what a move has left, and not with what one before it had gathered."""
    model, alone, text = wrapped("fsdp2", seeded(Uneven)), seeded(Uneven), torch.arange(6).view(1, 6)
    model(text)
    group = GroupReplica(model, Control())
    model(text)
    move(group, "cut")
    model(text)
    target = values(group.schema.numel, seed=1)
    move(group, "adopt", target)
    Replica(alone).reset(target)
    return torch.equal(model(text), alone(text))


def test_an_evaluation_between_two_steps_leaves_nothing_behind(told: Told) -> None:
    assert told["evaluated"] == [True, True]


def counted(rank: int) -> list[float]:
    """A buffer after the run's has come, and after it has been reset."""
    model, group = joined("ddp")
    count, seen = unwrapped(model).count, []
    count.fill_(5.0 + rank)
    for name, number in (("adopt", 9.0), ("reset", 4.0)):
        move(group, name, values(group.schema.numel, seed=1), (torch.tensor([number]),))
        seen.append(float(count))
    return seen


def test_the_buffers_of_rank_0_are_everybodys(told: Told) -> None:
    assert told["counted"] == [[7.0, 4.0]] * 2


def held(rank: int) -> dict[str, int]:
    _, group = joined("fsdp2")
    delta = move(group, "cut")
    return {"delta": delta.numel(), "base": sum(part._base.numel() for part in group._parts)}


def test_a_rank_holds_its_part_and_rank_0_alone_a_whole_delta(told: Told) -> None:
    first, second = told["held"]
    numel = Replica(made("alone")).schema.numel
    assert (first["delta"], second["delta"]) == (numel, 0)
    assert first["base"] + second["base"] == numel
    assert 0 < second["base"] < first["base"] < numel


def uploaded(rank: int) -> list[str]:
    """What differs from what a single process begins a run with."""
    _, group = joined("fsdp2")
    if rank == 0:
        with ThreadPoolExecutor() as background:
            upload = background.submit(group.initial_upload)
            while not group.is_asked_for:
                time.sleep(0.001)
            group.gather()
            return [] if upload.result() == Replica(made("alone")).initial_upload() else ["the upload"]
    assert group.control.hear().kind is Kind.GATHER
    group.gather()
    return []


def test_a_run_begins_with_the_same_bytes_whoever_is_first(told: Told) -> None:
    assert told["uploaded"] == [[], []]


# --- what ranks are told that do not fit together ---


def another_model(rank: int) -> None:
    model = made("ddp")
    unwrapped(model).row = nn.Parameter(torch.ones(1, 5 + rank))
    GroupReplica(unwrapped(model), Control())


def another_software(rank: int) -> None:
    Control().require_equal("the ranks of a group run different software", f"torch 2.{rank}")


def complaining(rank: int) -> None:
    Control().require_none("its disk is gone" if rank == 1 else "")


def alone_in_join(rank: int) -> None:
    control.ASSEMBLE_SECONDS = 0.5
    if rank == 0:
        Control()


def failing(rank: int) -> None:
    told = Control()
    with told.failure_is_told():
        if rank == 0:
            raise PeerError("the server is another one")
        told.hear()


def test_a_rank_that_is_alone_in_join_says_so_in_the_end(tmp_path: Path) -> None:
    told, _ = on_ranks(tmp_path, 2, alone_in_join)["alone_in_join"]
    assert told.startswith(
        "rank 0 has waited 0.5 s in hetero_async.join for the other ranks: "
        "each of the 2 processes that torchrun started must call it ("
    )


def strayed(rank: int) -> None:
    model, group = joined("alone")
    stepped(model, seed=rank)
    move(group, "cut")


def replaced(rank: int) -> None:
    model, group = joined("alone")
    model.row = nn.Parameter(torch.ones(1, 5))
    move(group, "cut")


def resized(rank: int) -> None:
    model, group = joined("alone")
    model.row.data = torch.ones(1, 6)
    move(group, "cut")


def grown(rank: int) -> None:
    model, group = joined("alone")
    model.adapter = nn.Linear(2, 2)
    move(group, "cut")


TOLD: dict[Script, str] = {
    another_model: "rank 1: the model differs from rank 0's: tensor row: expected [1, 5], found [1, 6]",
    another_software: "the ranks of a group run different software: torch 2.0 on rank 0, torch 2.1 on rank 1; "
    "it must be the same on every rank",
    complaining: "rank 1: its disk is gone",
    strayed: "rank 1 has other parameters than rank 0 after a round: average the gradients of all ranks before each "
    "step, as DistributedDataParallel and fully_shard do",
    replaced: "row was replaced after joining: change the model before that",
    resized: "row went from [1, 5] to [1, 6] after joining: change the model before that",
    grown: "adapter.weight requires a gradient and did not when the model joined: nobody else would learn of it; "
    "add or unfreeze parameters before joining",
}


@pytest.mark.parametrize("script", TOLD, ids=lambda script: script.__name__)
def test_all_ranks_are_told_what_does_not_fit(told: Told, script: Script) -> None:
    assert told[script.__name__] == [TOLD[script]] * 2


def test_what_rank_0_fails_of_the_others_fail_of(told: Told) -> None:
    assert told["failing"] == ["the server is another one", "rank 0: the server is another one"]


# --- messages ---


def spoken(rank: int) -> list[Any]:
    told = Control()
    told.bear(3)
    said = [
        Said(kind=Kind.STEPPED, progress=1 / 3, number=2**60, is_kept=True, positions=[7, 2**40, 9]),
        Said(kind=Kind.DRAWN),
        Said(kind=Kind.DRAWN, positions=[]),
    ]
    heard = said
    if rank == 0:
        for one in said:
            told.say(one)
    else:
        heard = [told.hear() for _ in said]
    return [heard == said, told.share(b"content" if rank == 0 else b"").decode(), told.texts(f"é{rank}")]


def test_what_rank_0_says_the_others_hear(told: Told) -> None:
    assert told["spoken"] == [[True, "content", ["é0", "é1"]]] * 2


def test_a_wrapped_model_has_the_names_that_it_has_everywhere() -> None:
    model = Model()
    assert unwrapped(torch.compile(model, backend="eager")) is model
    assert unwrapped(model) is model


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """What two ranks say of all that needs no ranks of its own: processes take longer than what they do here."""
    return on_ranks(tmp_path_factory.mktemp("ranks"), 2, evaluated, counted, held, uploaded, failing, spoken, *TOLD)
