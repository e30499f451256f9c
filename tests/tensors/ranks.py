"""Several ranks of a group, each a process of its own, as torchrun would start them."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from e2e.harness import Life, free_port

from hetero_async.errors import HeteroAsyncError


def on_ranks(directory: Path, size: int, *scripts: Callable[..., Any], **options: Any) -> dict[str, list[Any]]:
    """What each `script(rank, **options)` returns, by its name and then by rank; of a HeteroAsyncError its words.

    One after another in the same processes; what they return is told through JSON.
    """
    port = free_port()
    lives = [
        Life(
            f"rank {rank}", directory / f"rank-{rank}.output", _life, str(directory), rank, size, port, scripts, options
        )
        for rank in range(size)
    ]
    for life in lives:
        assert life.ending() == 0, "\n".join(f"--- {life.name}:\n{life.said}" for life in lives)
    told = [json.loads((directory / f"rank-{rank}.json").read_text()) for rank in range(size)]
    return {script.__name__: [by_rank[script.__name__] for by_rank in told] for script in scripts}


def _life(
    directory: str, rank: int, size: int, port: int, scripts: Sequence[Callable[..., Any]], options: dict[str, Any]
) -> None:
    for descriptor in (1, 2):
        os.dup2(os.open(f"{directory}/rank-{rank}.output", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    told = {script.__name__: _told(script, rank, options) for script in scripts}
    Path(f"{directory}/rank-{rank}.json").write_text(json.dumps(told))


def _told(script: Callable[..., Any], rank: int, options: dict[str, Any]) -> Any:
    try:
        return script(rank, **options)
    except HeteroAsyncError as error:
        return str(error)
