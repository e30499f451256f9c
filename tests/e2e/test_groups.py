"""Workers that are torchrun groups: they train one model with those that are not, and come back when a rank dies."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from e2e import groups
from e2e.commands import background
from e2e.harness import Run, free_port
from e2e.tiny import seeded
from safetensors.torch import load_file

from hetero_async.core.records import Joined
from hetero_async.tensors.model import ServerModel

SIZE = 2
SITES = {"a": 1, "b": 1, "c": 1}
EXAMPLE = Path(__file__).parents[2] / "examples/torchrun_gpt.py"


def start_group(run: Run, worker: str, kind: str, **options: Any) -> None:
    port = free_port()
    for rank in range(SIZE):
        run.start_worker(worker, groups.train, awaited=run.names, kind=kind, rank=rank, size=SIZE, port=port, **options)


def results(run: Run, worker: str, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.config.worker_directory(worker) / f"results-{rank}.json").read_text())
    return found


def final(run: Run, worker: str, rank: int) -> dict[str, torch.Tensor]:
    return load_file(run.config.worker_directory(worker) / f"final-{rank}.safetensors")


def last_publish(run: Run) -> dict[str, torch.Tensor]:
    """Where all workers stand when the run is over: the shadow, which every publish moves, by the model's own names."""
    model = ServerModel()
    for entry in run.entries():
        model.apply(entry)
    sizes = [tensor.numel for tensor in model.schema.tensors]
    pieces = zip(model.schema.tensors, model.shadow.split(sizes), strict=True)
    return {tensor.name: piece.view(tensor.shape) for tensor, piece in pieces}


def padded_chunks(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What fully_shard leaves of it to each rank; the last may get less, or nothing."""
    chunks = list(tensor.chunk(SIZE))
    return chunks + [tensor.new_empty(0, *tensor.shape[1:])] * (SIZE - len(chunks))


def test_ddp_fsdp2_and_a_single_process_train_one_model(tmp_path: Path) -> None:
    samples = 803
    with Run(tmp_path / "run", samples=samples, sites=SITES, steps_per_round=4, max_staleness=100) as run:
        run.start_server()
        ddp, sharded, alone = run.names
        start_group(run, ddp, "ddp", samples=samples)
        start_group(run, sharded, "fsdp2", samples=samples)
        # It must leave them time for some rounds of their own.
        told = {"kind": "alone", "samples": samples, "step_seconds": 0.03}
        run.start_worker(alone, groups.train, awaited=run.names, **told)
        verdict = run.finish()
        assert verdict.samples == samples
        assert {worker for worker, _ in verdict.deltas} == {ddp, sharded, alone}
        expected, start = last_publish(run), seeded(groups.Uneven).state_dict()
        whole = [final(run, worker, rank) for worker, rank in ((ddp, 0), (ddp, 1), (alone, 0))]
        parts = [final(run, sharded, rank) for rank in range(SIZE)]
        for name, tensor in expected.items():
            assert not torch.equal(tensor, start[name]), name
            for found in whole:
                assert torch.equal(found[name], tensor), name
            for found, part in zip(parts, padded_chunks(tensor), strict=True):
                assert torch.equal(found[name], part), name
        ranks = [(worker, rank) for worker in (ddp, sharded) for rank in range(SIZE)]
        told = [results(run, worker, rank) for worker, rank in [*ranks, (alone, 0)]]
        assert {result["progress"] for result in told} == {1.0}
        trained = [number for batch in told[-1]["batches"] for number in batch]
        for first, second in (told[0:2], told[2:4]):
            assert first["rates"] == second["rates"], "the same learning rates, to the bit"
            assert len(set(first["rates"])) > 1
            for ours, theirs in zip(first["batches"], second["batches"], strict=True):
                is_repeated = len(ours) == 1 and ours == theirs  # the last sample of all, for a rank that has none
                trained += ours if is_repeated else ours + theirs
        assert sorted(trained) == list(range(samples)), "each once"
        kept = [
            sorted(path.name for path in run.config.worker_directory(worker).glob("*.kept")) for worker in run.names
        ]
        assert kept == [["optimizer.kept"], ["optimizer-0-of-2.kept", "optimizer-1-of-2.kept"], ["optimizer.kept"]]


def ranks_of(run: Run) -> dict[int, int]:
    """Its processes that torchrun started, by rank."""
    found: dict[int, int] = {}
    for directory in Path("/proc").iterdir():
        try:
            variables = (directory / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it is no process, or not ours
            continue
        told = dict(variable.split("=", 1) for variable in variables if "=" in variable)
        if told.get("HETERO_ASYNC_RUN") == str(run.config.path) and "LOCAL_RANK" in told:
            found[int(told["RANK"])] = int(directory.name)
    return found


def test_a_group_of_which_a_rank_is_killed_comes_back_and_the_run_goes_on(tmp_path: Path) -> None:
    torchrun = Path(sys.executable).parent / "torchrun"
    with Run(tmp_path / "run", workers=1, samples=960) as run:
        run.start_server()
        work = [sys.executable, "-m", "hetero_async", "work", "--run", run.config.path, "--site", "here", "--"]
        # Its first life is sharded, the next is not: what lies where is no matter of the run's.
        lives = ["sh", "-c", f'if mkdir {tmp_path}/lived; then exec "$@" --shard; else exec "$@"; fi', "sh"]
        group = [*lives, torchrun, "--standalone", "--nproc-per-node", SIZE, EXAMPLE, "--batch-size", 4]
        said = tmp_path / "work.output"
        with background(said, *work, *group) as working:
            run.wait(lambda: run.deltas("here-0"), "the group has pushed")
            os.kill(ranks_of(run)[1], signal.SIGKILL)
            run.wait(lambda: working.poll() is not None, "the group's worker ends")
            assert working.returncode == 0, said.read_text()
        verdict = run.finish()
        assert verdict.samples == 960
        assert [joined.incarnation for joined in run.records(Joined)] == [1, 2]
        assert not ranks_of(run)
