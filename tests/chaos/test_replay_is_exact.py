"""One log, one outcome: whatever the number of threads and the instructions of the CPU that replays it."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import trio
from small_run import SmallRun

from hetero_async.core.records import Delta, RunSettings, Stepped
from hetero_async.shell.log import FileLog
from hetero_async.shell.threads import in_thread
from hetero_async.tensors.codecs import CODECS

# So many samples that every codec comes twice, in merges of two.
ROUNDS = len(CODECS)
WORKERS = ("a-0", "a-1")
RULES = ("nesterov", "lookahead", "sgd")  # whole rounds are what `delayed-nesterov` has no word of its own for
REPLAY = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(int(sys.argv[1]))
from hetero_async.looking import verify_directory
print(torch.get_num_threads(), torch.backends.cpu.get_cpu_capability())
for log in sys.argv[2:]:
    verdict = verify_directory(Path(log), lambda _: None)
    print(verdict.is_ok, verdict.beacons, verdict.state.digest().hex(), verdict.model_hash.hex())
"""


def wide_model() -> torch.nn.Module:
    """Large enough that torch shares its blocks out among threads, and of no round size."""
    torch.manual_seed(1)
    return torch.nn.Linear(401, 503)


def recorded(directory: Path, rule: str) -> str:
    """Write a run with every codec up, and one of them down, and return the line that a replay must print."""
    codec_down = list(CODECS)[RULES.index(rule) % len(CODECS)]
    settings = RunSettings(run="small", samples=2 * 8 * ROUNDS, merge="all", rule=rule, codec_down=codec_down)
    run = SmallRun(settings, wide_model)
    for worker in WORKERS:
        run.join(worker)
    for number in range(ROUNDS):
        run.lease(WORKERS[1])  # so that the merge waits for it
        for shift, worker in enumerate(WORKERS):
            run.push(worker, list(CODECS)[(number + shift) % ROUNDS])
    merges = [len(entry.record.deltas) for entry in run.entries if isinstance(entry.record, Stepped)]
    assert merges == [2] * ROUNDS
    assert {entry.record.codec for entry in run.entries if isinstance(entry.record, Delta)} == set(CODECS)
    trio.run(write, directory, run)
    return f"True {ROUNDS} {run.server.state.digest().hex()} {run.model.model_hash().hex()}"


async def write(directory: Path, run: SmallRun) -> None:
    log = FileLog.open(directory, "small", in_thread)
    await log.append(run.entries)
    log.close()


def replayed(threads: int, capability: str, logs: list[Path]) -> list[str]:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    environment = {key: value for key, value in environment.items() if not key.endswith("_NUM_THREADS")}
    command = [sys.executable, "-c", REPLAY, str(threads), *map(str, logs)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="this CPU has one way to compute only")
def test_a_log_replays_to_the_same_bits_with_other_threads_and_other_instructions(tmp_path: Path) -> None:
    logs = [tmp_path / rule / "log" for rule in RULES]
    for log in logs:
        log.parent.mkdir()
    expected = [recorded(log, log.parent.name) for log in logs]
    ways = [(1, "default"), (2, "avx2"), (2, "default"), (1, "avx2")]
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda way: replayed(*way, logs), ways))
    for (threads, capability), (said, *outcome) in zip(ways, outcomes, strict=True):
        assert said == f"{threads} {capability.upper()}"
        assert outcome == expected, (threads, capability)
    assert len(set(expected)) == len(RULES), "the rules do differ"
