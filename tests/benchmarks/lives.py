"""Processes of a benchmark: the real server and real workers with the product's own intervals, nobody looking on.

`BenchRun` is the harness' Run with such lives: nothing is hurried, noted down or withheld in them.
"""

import gc
import os
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.pusher import NO_END, push_life
from e2e.harness import Life, Run
from e2e.lives import speak_to
from network.sites import Sites
from network.spread import life_inside

from hetero_async import cli
from hetero_async.config import ENV_RUN, ENV_WORKER, RunConfig

CORES = os.cpu_count() or 1
HOME, FAR = "home", "far"
PORT = 7710


class BenchRun(Run):
    """`samples` never end unless told, checkpoints and the dropping of the log are as the product has them.

    `network`: the server lives in its site HOME, and everybody else in FAR.
    """

    def __init__(
        self, directory: Path, *, network: Sites | None = None, server: dict[str, Any] | None = None, **options: Any
    ) -> None:
        self.network = network
        server = {"checkpoint_every": 50, "keep_log": False, **(server or {})}
        if network is not None:
            server |= {"address": f"tcp://{network.address(HOME)}:{PORT}", "bulk_address": ""}
        options = {"samples": 1 << 40, "steps_per_round": 64, "lease_ttl_seconds": 60.0, **options}
        super().__init__(directory, server=server, **options)

    def serve(self, cores: Collection[int] = (), life: Callable[..., None] | None = None) -> Life:
        output = self._output("server")
        told = str(self.config.path), ["serve"], str(output), list(cores)
        return self._start("server", output, life or verb_life, *told)

    def agent(self, site: str, *command: str) -> Life:
        """`hetero-async work`: starts the site's workers, and those that die again."""
        output = self._output(site)
        verb = ["work", "--site", site]
        return self._start(site, output, verb_life, str(self.config.path), verb, str(output), [], command)

    def train(self, worker: str, script: Callable[..., None], cores: Collection[int] = (), **options: Any) -> Life:
        output = self._output(worker)
        told = str(self.config.path), worker, str(output), list(cores), script, options
        return self._start(worker, output, script_life, *told)

    def push(
        self, workers: Sequence[str], numel: int, codec: str, out: Path, follows: bool = False, deltas_max: int = NO_END
    ) -> Life:
        """These workers in one process, as pusher.py has them."""
        told = {"run_toml": str(self.config.path), "workers": workers, "numel": numel, "codec": codec, "out": str(out)}
        return self.beside("pushers", push_life, **told, follows=follows, deltas_max=deltas_max)

    def beside(self, name: str, script: Callable[..., None], cores: Collection[int] = (), **options: Any) -> Life:
        """A process that the run knows nothing of, or several workers in one."""
        output = self._output(name)
        return self._start(name, output, plain_life, str(output), list(cores), script, options)

    def _start(self, name: str, output: Path, target: Callable[..., None], *arguments: object) -> Life:
        if self.network is None:
            return super()._start(name, output, target, *arguments)
        namespace = self.network.namespace(HOME if name == "server" else FAR)
        return super()._start(name, output, life_inside, namespace, 0.0, target, *arguments)


def verb_life(run_toml: str, verb: list[str], output: str, cores: list[int], command: Sequence[str] = ()) -> None:
    """`hetero-async VERB --run … [-- COMMAND]` as it stands, on those cores (all, if none are named)."""
    settle_in(output, cores, threads=len(cores) or CORES)
    sys.argv = ["hetero-async", *verb, "--run", run_toml, *(["--", *command] if command else [])]
    cli.main()


def script_life(
    run_toml: str, worker: str, output: str, cores: list[int], script: Callable[..., None], options: dict[str, Any]
) -> None:
    """A worker's script, as its site's agent would start it."""
    settle_in(output, cores, threads=1)
    os.environ |= {ENV_RUN: run_toml, ENV_WORKER: worker}
    RunConfig.load(Path(run_toml)).worker_directory(worker).mkdir(parents=True, exist_ok=True)
    script(**options)


def plain_life(output: str, cores: list[int], script: Callable[..., None], options: dict[str, Any]) -> None:
    settle_in(output, cores, threads=1)
    script(**options)


def settle_in(output: str, cores: list[int], threads: int) -> None:
    speak_to(output)
    gc.unfreeze()
    if cores:
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)


def peak_bytes(pid: int) -> int:
    """Of a process' resident memory, so far."""
    return _memory(pid, "VmHWM:")


def resident_bytes(pid: int) -> int:
    return _memory(pid, "VmRSS:")


def _memory(pid: int, name: str) -> int:
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(name)]
    return 1024 * int(line.split()[1])
