"""Ranks of a torchrun group, as a user's script makes them: under DistributedDataParallel, or sharded by fully_shard.

The harness forks one process a rank and gives it what torchrun would.
"""

import time

import torch
import torch.distributed
from e2e.tiny import Text, leave_results, loss_of, seeded
from safetensors.torch import save_file
from torch import Tensor, nn

import hetero_async as ha
from hetero_async import inner_state
from hetero_async.config import from_environment

BATCH = 4  # samples a rank


class Uneven(nn.Module):
    """Nothing in it can be halved without a rest; tied and frozen parameters, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(257, 12)
        self.frozen = nn.Linear(12, 13).requires_grad_(False)
        self.back = nn.Linear(13, 12, bias=False)
        self.single = nn.Parameter(torch.ones(1, 12))
        self.output = nn.Linear(12, 257, bias=False)
        self.output.weight = self.bytes.weight
        self.register_buffer("constant", torch.tensor([2.0]))

    def forward(self, text: Tensor) -> Tensor:
        stream = self.bytes(text)
        return self.output((stream + self.back(self.frozen(stream).tanh())) * self.single * self.constant)


def wrapped(kind: str, model: nn.Module) -> nn.Module:
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard  # a second that single processes are spared

        fully_shard(model)
    return model


def open_group(rank: int, size: int, port: int) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)


def train(
    *, kind: str, rank: int = 0, size: int = 1, port: int = 0, samples: int = 2000, step_seconds: float = 0.0
) -> None:
    """`kind`: alone | ddp | fsdp2. Leaves its rank's part of the parameters, and what it has trained on.

    What it keeps of its optimizer it keeps at the end of every round.
    """
    inner_state.KEEP_SECONDS = 0.0
    if kind != "alone":
        open_group(rank, size, port)
    model = wrapped(kind, seeded(Uneven))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    session = ha.join(model, optimizer)
    session.scheduler(optimizer, lambda progress: 1 - progress / 2)
    batches: list[list[int]] = []
    rates: list[float] = []
    for batch in session.batches(Numbered(samples), BATCH):
        optimizer.zero_grad()
        loss_of(model, batch[:, 1:]).backward()
        time.sleep(step_seconds)
        optimizer.step()
        batches.append(batch[:, 0].tolist())
        rates.append(optimizer.param_groups[0]["lr"])
    config, worker = from_environment()
    directory = config.worker_directory(worker)
    parts = {
        name.removeprefix("module."): value.to_local() if hasattr(value, "to_local") else value
        for name, value in model.state_dict().items()
        if not name.endswith("output.weight")
    }
    save_file({name: part.contiguous() for name, part in parts.items()}, directory / f"final-{rank}.safetensors")
    leave_results(f"results-{rank}.json", batches=batches, rates=rates, progress=session.progress)
    if kind != "alone":
        torch.distributed.destroy_process_group()


class Numbered(Text):
    """Each sample begins with its number."""

    def __getitem__(self, number: int) -> Tensor:
        return torch.cat([torch.tensor([number]), super().__getitem__(number)])
