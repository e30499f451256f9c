"""A worker whose layers compute something else than the others' is told so before its first step, or refused."""

import time
from pathlib import Path

import torch
import torch.distributed
from e2e.groups import open_group, wrapped
from e2e.harness import Life, Run, free_port
from e2e.tiny import BATCH, WIDTH, Text, leave_results, loss_of, pause, seeded
from torch import nn

import hetero_async as ha
from hetero_async.core.records import Joined, Left, Probed, Published

NAMED = torch.arange(32).reshape(2, 16)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Curved(nn.Module):
    """Parameters are named and shaped alike, whatever the activation is."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, WIDTH)
        self.curve: nn.Module = nn.GELU()
        self.output = nn.Linear(WIDTH, 256)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        return self.output(self.curve(self.bytes(text)))


def train_probed(*, is_other: bool = False, dtype: str = "fp32", names_batch: bool = False, hold: str = "") -> None:
    model = seeded(Curved).to(DTYPES[dtype])
    if is_other:
        model.curve = nn.Tanh()
    before = [value.clone() for value in model.state_dict().values()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    session = ha.join(model, optimizer, probe=NAMED if names_batch else None)
    after = list(model.state_dict().values())
    leave_results(is_changed=not all(map(torch.equal, before, after)))
    optimizer.param_groups[0]["lr"] = 0.5
    for text in session.batches(Text(), BATCH):
        pause(0.0, hold)
        optimizer.zero_grad()
        loss_of(model, text).backward()
        time.sleep(0.003)
        optimizer.step()


def train_in_group(*, kind: str, rank: int, size: int, port: int, is_other: bool, hold: str) -> None:
    open_group(rank, size, port)
    model = seeded(Curved)
    if is_other:
        model.curve = nn.Tanh()
    model = wrapped(kind, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    session = ha.join(model, optimizer, probe=NAMED)
    for text in session.batches(Text(), BATCH):
        pause(0.0, hold)
        optimizer.zero_grad()
        loss_of(model, text).backward()
        optimizer.step()
    torch.distributed.destroy_process_group()


def probe_of(run: Run, worker: str) -> str:
    workers = run.status()["workers"]
    return next((str(row["probe"]) for row in workers if row["worker"] == worker), "")


def test_who_differs_is_told_so_and_trains_on(tmp_path: Path) -> None:
    """Everywhere at once: at the worker, in the server's log, in the status. One in another dtype does not differ."""
    hold = tmp_path / "hold"
    hold.touch()
    with Run(tmp_path / "run", workers=3, samples=1200) as run:
        first, coarse, other = run.names
        server = run.start_server()
        run.start_worker(first, train_probed, names_batch=True, hold=str(hold))
        run.wait(lambda: run.records(Probed), "there is a reference")
        run.start_worker(coarse, train_probed, names_batch=True, dtype="bf16", hold=str(hold))
        life = run.start_worker(other, train_probed, names_batch=True, is_other=True, hold=str(hold))
        reason = run.wait(lambda: probe_of(run, other), "it is probed")
        run.wait(lambda: probe_of(run, coarse) == "reference", "so is the other one")
        assert f"{other} (site here, cpu, fp32, torch" in reason
        assert f"{first} (site here, cpu, fp32, torch" in reason
        assert "curve is the first layer that differs" in reason
        assert probe_of(run, first) == "reference"
        run.wait(lambda: reason in life.said, "the worker says it")
        assert "probe differs" in server.said
        hold.unlink()
        run.finish()
        assert [(probed.worker, probed.digest.arithmetic) for probed in run.records(Probed)] == [
            (first, "fp32"),
            (coarse, "bf16"),
        ]
        assert run.deltas(other), "it trained on"
        assert not run.results(first)["is_changed"], "parameters are what they were"


def test_who_differs_is_refused_late_in_the_run_and_by_another_server(tmp_path: Path) -> None:
    with Run(tmp_path / "run", workers=2, samples=4000, probe="refuse") as run:
        first, other = run.names
        server = run.start_server()
        good = run.start_worker(first, train_probed)
        run.wait(lambda: run.records(Published)[2:], "the parameters have moved")
        server.kill()
        server = run.start_server()
        refused = run.start_worker(other, train_probed, is_other=True)
        assert refused.ending() != 0
        assert "curve is the first layer that differs" in refused.said
        assert "RefusedError" in refused.said
        assert not run.deltas(other), "before its first step"
        (left,) = [left for left in run.records(Left) if left.worker == other]
        assert "curve" in left.reason
        again = run.start_worker(other, train_probed)
        run.finish(server, good, again)
        assert len(run.records(Probed)) == 1, "the reference outlived its server"
        assert sum(joined.worker == other for joined in run.records(Joined)) == 2
        assert run.deltas(other), "mended, it takes part"


def test_groups_are_compared_with_whoever_began_the_run(tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    with Run(tmp_path / "run", workers=3, samples=1200) as run:
        ddp, sharded, other = run.names
        run.start_server()

        def start(worker: str, kind: str, is_other: bool = False) -> list[Life]:
            told = {"kind": kind, "size": 2, "port": free_port(), "is_other": is_other, "hold": str(hold)}
            return [run.start_worker(worker, train_in_group, rank=rank, **told) for rank in range(2)]

        start(ddp, "ddp")
        run.wait(lambda: probe_of(run, ddp) == "reference", "a group is the reference")
        start(sharded, "fsdp2")
        first, _ = start(other, "fsdp2", is_other=True)
        run.wait(lambda: probe_of(run, sharded) == "agrees", "parameters in parts make no difference")
        reason = run.wait(lambda: probe_of(run, other), "it is probed")
        assert f"{other} (site here, 2 × cpu, fp32, torch" in reason
        assert "curve is the first layer that differs" in reason
        run.wait(lambda: reason in first.said, "the group says it")
        hold.unlink()
        run.finish()
        assert all(run.deltas(worker) for worker in run.names), "all train on"
