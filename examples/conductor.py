"""What the demos share: a run of three sites on this machine, whose processes are started, watched and ended.

run_local.py and run_failover.py say what becomes of them. Everything in here is what a person or
systemd would do by hand.
"""

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
from rich.console import Console
from rich.live import Live
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
import byte_gpt
from safetensors.torch import load_file

from hetero_async import asking
from hetero_async.config import RunConfig
from hetero_async.errors import HeteroAsyncError, first_error
from hetero_async.shell.telemetry import LineObserver
from hetero_async.watch.status import render

SCRIPT = Path(__file__).with_name("byte_gpt.py")
BATCH = 8
# site → workers, dtype, and how many times slower than the fastest its steps are made
SITES = {"amsterdam": (2, "fp32", 1), "shanghai": (1, "bf16", 2), "office": (1, "fp32", 4)}
ACCELERATED = "amsterdam"  # the site that --device is of
TRAINING = {"lease_ttl_seconds": 6.0}
STEP_SECONDS = 0.03
LOOK_SECONDS = 0.5
# The run is over long before; a demo that hangs must say so instead of hanging on.
LIMIT_SECONDS = 600.0
OUTPUTS = {"model": "model.safetensors", "loss picture": "loss.png", "report": "report.json", "page": "report.html"}
# The server is meant to be away for a while.
NOISE = frozenset({"server not reached", "server reached"})


@dataclass
class Story:
    """What the conductor saw."""

    started: float = field(default_factory=time.monotonic)
    losses: list[tuple[float, float]] = field(default_factory=list)
    kills: list[tuple[float, str]] = field(default_factory=list)
    newest: dict[str, Any] = field(default_factory=dict)
    # What each life of the server has counted, which begins at nothing; the last one's is the present one's.
    lives: list[Counter[str]] = field(default_factory=lambda: [Counter()])
    trained: float = 0.0  # when all was trained

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def progress(self) -> float:
        """The share of the run that is trained."""
        return self.newest["trained"] / self.newest["positions"] if self.newest.get("positions") else 0.0

    def see(self, status: dict[str, Any]) -> None:
        metric = status["metrics"].get("validation_loss")
        if metric and (not self.losses or metric["value"] != self.losses[-1][1]):
            self.losses.append((self.seconds, metric["value"]))
        self.newest = status
        self.lives[-1] = Counter(bytes_wire=sum(status["bytes"].values()), deltas_refused=status["deltas"]["refused"])

    @property
    def counted(self) -> Counter[str]:
        """By all lives of the server."""
        return sum(self.lives, Counter())

    def killed(self, who: str) -> None:
        self.kills.append((self.seconds, who))

    def begin_life(self) -> None:
        """The server that is seen from now on counts from nothing again."""
        self.lives.append(Counter())


@dataclass(frozen=True, slots=True)
class Promise:
    """Something that a report must show; `broken` says that it does not, with the report's figures for its {keys}."""

    is_kept: Callable[[dict[str, Any]], bool]
    broken: str


VERIFIED = Promise(lambda report: report["verify"] == "ok", "verify failed")
ONCE = Promise(lambda report: report["samples_counted_twice"] == 0, "{samples_counted_twice} samples counted twice")


class Conductor:
    def __init__(self, config: RunConfig, device: str = "cpu") -> None:
        self.config = config
        self.device = device
        self.story = Story()
        self._logs = config.directory / "logs"
        self._logs.mkdir()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *arguments: str, group: int = 0) -> None:
        """Start `hetero-async ARGUMENTS` in that process group, 0: in one of its own."""
        command = [sys.executable, "-m", "hetero_async", *arguments]
        with self._log(name).open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, process_group=group
            )  # fmt: skip

    def start_site(self, site: str, *, group: int = 0) -> None:
        """Start the agent of a site, which starts its workers."""
        _, dtype, slower = SITES[site]
        script = [sys.executable, str(SCRIPT), "--dtype", dtype, "--batch-size", str(BATCH)]
        script += ["--step-seconds", str(STEP_SECONDS * slower)]
        if site == ACCELERATED:
            script += ["--device", self.device]
        self.start(site, "work", "--run", str(self.config.path), "--site", site, "--", *script, group=group)

    def kill(self, name: str) -> None:
        """SIGKILL its process group; it is gone on return."""
        self.strike(name)
        self.await_end(name)

    def strike(self, name: str) -> None:
        """SIGKILL its process group, and do not wait."""
        os.killpg(self.processes[name].pid, signal.SIGKILL)

    def await_end(self, *names: str) -> None:
        """Of those that were struck."""
        for name in names:
            self.processes.pop(name).wait()

    async def conduct(self, screen: Live, act: Callable[[], Awaitable[bool]]) -> None:
        """Look at the run again and again, and `act` after each look, until that says that all is over."""
        with trio.move_on_after(LIMIT_SECONDS):
            async with asking.open_status(self.config, LineObserver(NOISE)) as ask:
                while True:
                    status = await ask()
                    if status is not None:
                        self._tell_address(screen, status)
                        self.story.see(status)
                        screen.update(render(status), refresh=True)
                    if await act():
                        self.story.trained = self.story.seconds
                        return
                    await trio.sleep(LOOK_SECONDS)
        raise HeteroAsyncError(f"this is not over after {LIMIT_SECONDS:g} s; see {self._logs}")

    def _tell_address(self, screen: Live, status: dict[str, Any]) -> None:
        """Where the run can be watched, whenever that is another place."""
        address = status["dashboard"]
        if address and address != self.story.newest.get("dashboard"):
            screen.console.print(f"watch it at {address}")

    def have_ended(self, *names: str) -> bool:
        """Ends the demo when any process failed: nothing good comes of waiting for the others then."""
        codes = {name: process.poll() for name, process in self.processes.items()}
        for name, code in codes.items():
            if code:
                raise HeteroAsyncError(f"{name} ended with exit code {code}; see {self._log(name)}")
        return all(codes[name] == 0 for name in names)

    def stop(self, *names: str) -> None:
        """Have these, or all, end as at a person's word; they have ended on return."""
        chosen = [self.processes[name] for name in names] or list(self.processes.values())
        for process in chosen:
            if process.poll() is None:
                process.terminate()
        for process in chosen:
            process.wait()

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """A demo runs in here; what it dies of is told without a traceback, as a verb would."""
    failure: HeteroAsyncError | None = None
    try:
        yield
    except* HeteroAsyncError as group:
        failure = first_error(group)
    if failure is not None:
        sys.exit(f"error: {failure}")


def clear(directory: Path) -> None:
    """Make room for a new run; an earlier demo there goes away."""
    if not directory.exists():
        return
    if not (directory / "run.toml").exists():
        sys.exit(f"error: {directory} is not a run of this demo; remove it, or choose another --directory")
    shutil.rmtree(directory)


def free_address() -> str:
    """A port of this machine that nobody uses, and whose successor nobody uses: the bulk lane's."""
    while True:
        with socket.socket() as control, socket.socket() as bulk:
            control.bind(("127.0.0.1", 0))
            port = control.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                bulk.bind(("127.0.0.1", port + 1))
                return f"tcp://127.0.0.1:{port}"


def losses(model: Path) -> dict[str, float]:
    """The validation loss with which every run starts, and that of the exported model."""
    net = byte_gpt.seeded_model()
    start = byte_gpt.validation_loss(net)
    net.load_state_dict(load_file(model))
    return {"loss_start": round(start, 4), "loss_end": round(byte_gpt.validation_loss(net), 4)}


def told_kills(story: Story) -> list[dict[str, Any]]:
    """As a report's JSON has them."""
    return [{"seconds": round(seconds, 1), "who": who} for seconds, who in story.kills]


def options(description: str, *, directory: str, samples: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path(directory))
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--device", default="cpu", help=f"what {ACCELERATED}'s workers train on (default: cpu)")
    return parser.parse_args()


def outputs(config: RunConfig) -> dict[str, Path]:
    """Where the results lie, by what they are."""
    return {name: config.directory / file for name, file in OUTPUTS.items()}


def curve(report: dict[str, Any], story: Story) -> list[tuple[float, float]]:
    """The loss against time."""
    return [(0.0, report["loss_start"]), *story.losses, (story.trained, report["loss_end"])]


def show(rows: Sequence[tuple[str, str]], report: dict[str, Any], paths: dict[str, Path], console: Console) -> None:
    table = Table(show_header=False, title="what came of it")
    table.add_row("validation loss", f"{report['loss_start']:.2f} → [bold]{report['loss_end']:.2f}[/] nats/byte")
    results = [(name, str(path)) for name, path in paths.items()]
    for name, told in [*rows, ("took", f"{report['seconds']:.0f} s"), *results]:
        table.add_row(name, told)
    console.print()  # where it is no terminal, the status table ends within its last line
    console.print(table)


def broken(report: dict[str, Any], promises: Sequence[Promise]) -> list[str]:
    """What a report shows to be broken."""
    return [promise.broken.format(**report) for promise in promises if not promise.is_kept(report)]


def end(report: dict[str, Any], promises: Sequence[Promise]) -> None:
    """Ends the demo badly, in one line, when a promise was broken."""
    if told := broken(report, promises):
        sys.exit(f"error: a promise was broken: {'; '.join(told)}")
