"""Several ranks of a group, each a process of its own, as torchrun would start them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from e2e.harness import Life, free_port

from hetero_async.errors import HeteroAsyncError


def on_ranks(directory: Path, size: int, script: Callable[..., Any], **options: Any) -> list[Any]:
    """What `script(rank, **options)` returns on each rank, through JSON; of a HeteroAsyncError its words."""
    port = free_port()
    lives = [
        Life(
            f"rank {rank}", directory / f"rank-{rank}.output", _life, str(directory), rank, size, port, script, options
        )
        for rank in range(size)
    ]
    for life in lives:
        assert life.ending() == 0, "\n".join(f"--- {life.name}:\n{life.said}" for life in lives)
    return [json.loads((directory / f"rank-{rank}.json").read_text()) for rank in range(size)]


def _life(directory: str, rank: int, size: int, port: int, script: Callable[..., Any], options: dict[str, Any]) -> None:
    for descriptor in (1, 2):
        os.dup2(os.open(f"{directory}/rank-{rank}.output", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    try:
        told = script(rank, **options)
    except HeteroAsyncError as error:
        told = str(error)
    Path(f"{directory}/rank-{rank}.json").write_text(json.dumps(told))
