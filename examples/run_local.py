"""The whole of hetero_async on one machine: a server, four workers in three sites, two kills, one model.

    make run-local

Everything in here is what a person or systemd would do by hand: write run.toml, start processes, watch, and start the
server again after it was killed. It ends with the figures and a picture in runs/local.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
from rich.console import Console
from rich.live import Live
from rich.table import Table
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
import byte_gpt

from hetero_async import assembly, looking
from hetero_async.config import RunConfig
from hetero_async.shell.telemetry import LineObserver
from hetero_async.tables import template
from hetero_async.watch.report import draw_loss
from hetero_async.watch.status import Rate, render
from hetero_async.watch.verify import Verdict

SCRIPT = Path(__file__).with_name("byte_gpt.py")
BATCH = 8
# site → workers, dtype, and how many times slower than the fastest its steps are made
SITES = {"amsterdam": (2, "fp32", 1), "shanghai": (1, "bf16", 2), "office": (1, "fp32", 4)}
STEP_SECONDS = 0.03
KILL_WORKER_AT, KILL_SERVER_AT = 0.3, 0.6
VICTIM = "amsterdam-1"
SERVER_AWAY_SECONDS = 3.0
LOOK_SECONDS = 0.5
# The run is over long before; a demo that hangs must say so instead of hanging on.
LIMIT_SECONDS = 600.0
# The server is meant to be away for a while.
NOISE = frozenset({"server not reached", "server reached"})
OUTPUTS = {"model": "model.safetensors", "loss picture": "loss.png", "report": "report.json"}


@dataclass
class Story:
    """What the conductor saw."""

    started: float = field(default_factory=time.monotonic)
    losses: list[tuple[float, float]] = field(default_factory=list)
    kills: list[tuple[float, str]] = field(default_factory=list)
    bytes_of_earlier_servers: int = 0
    newest: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def bytes_wire(self) -> int:
        now: dict[str, int] = self.newest.get("bytes", {})
        return self.bytes_of_earlier_servers + sum(now.values())

    def see(self, status: dict[str, Any]) -> None:
        metric = status["metrics"].get("validation_loss")
        if metric and (not self.losses or metric["value"] != self.losses[-1][1]):
            self.losses.append((self.seconds, metric["value"]))
        self.newest = status

    def killed(self, who: str) -> None:
        self.kills.append((self.seconds, who))


class Conductor:
    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.story = Story()
        self.rate = Rate()
        self.logs = config.directory / "logs"
        self.logs.mkdir()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *arguments: str) -> None:
        command = [sys.executable, "-m", "hetero_async", *arguments]
        with (self.logs / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def start_server(self) -> None:
        self.start("server", "serve", "--run", str(self.config.path), "--exit-when-finished")

    def start_site(self, site: str) -> None:
        _, dtype, slower = SITES[site]
        script = [sys.executable, str(SCRIPT), "--dtype", dtype, "--batch-size", str(BATCH)]
        script += ["--step-seconds", str(STEP_SECONDS * slower)]
        if site == "office":
            script += ["--evaluate-every", "5"]
        self.start(site, "work", "--run", str(self.config.path), "--site", site, "--", *script)

    def kill_worker(self) -> None:
        pid = int((self.config.worker_directory(VICTIM) / "pid").read_text())
        os.kill(pid, signal.SIGKILL)
        self.story.killed(f"worker {VICTIM}")

    def kill_server(self) -> None:
        self.processes["server"].kill()
        self.processes["server"].wait()
        self.story.bytes_of_earlier_servers = self.story.bytes_wire
        self.story.newest = {**self.story.newest, "bytes": {}}
        self.story.killed("server")

    async def conduct(self, screen: Live) -> None:
        """Watch until all processes have ended by themselves; kill one worker and the server on the way."""
        worker_lives = server_lives = True
        with trio.fail_after(LIMIT_SECONDS):
            async with looking.open_status(self.config, LineObserver(NOISE)) as ask:
                while True:
                    status = await ask()
                    if status is not None:
                        self.story.see(status)
                        screen.update(render(self.rate.added_to(status, time.monotonic())), refresh=True)
                    if self.have_all_ended():
                        return
                    progress = _progress(self.story.newest)
                    if worker_lives and progress >= KILL_WORKER_AT:
                        worker_lives = False
                        self.kill_worker()
                    if server_lives and progress >= KILL_SERVER_AT:
                        server_lives = False
                        self.kill_server()
                        await trio.sleep(SERVER_AWAY_SECONDS)
                        self.start_server()
                    await trio.sleep(LOOK_SECONDS)

    def have_all_ended(self) -> bool:
        """Ends the demo when one of them failed: nothing good comes of waiting for the others then."""
        codes = {name: process.poll() for name, process in self.processes.items()}
        for name, code in codes.items():
            if code:
                sys.exit(f"error: {name} ended with exit code {code}; see {self.logs / name}.log")
        return all(code == 0 for code in codes.values())

    def stop(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        for process in self.processes.values():
            process.wait()


def prepare(directory: Path, samples: int) -> RunConfig:
    """A new run of three sites in `directory`; an earlier demo there goes away."""
    if directory.exists():
        if not (directory / "run.toml").exists():
            sys.exit(f"error: {directory} is not a run of this demo; remove it, or choose another --directory")
        shutil.rmtree(directory)
    text = template(
        run={"name": "byte-gpt", "samples": samples},
        sites={site: workers for site, (workers, _, _) in SITES.items()},
        server={"site": "amsterdam", "keep_log": True, "address": free_address()},
        training={"outer_learning_rate": 1.0, "momentum": 0.5, "lease_ttl_seconds": 6.0},
    )
    return assembly.initialize(directory, text)


def free_address() -> str:
    """A port of this machine that nobody uses, and whose successor nobody uses: the bulk lane's."""
    while True:
        with socket.socket() as control, socket.socket() as bulk:
            control.bind(("127.0.0.1", 0))
            port = control.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                bulk.bind(("127.0.0.1", port + 1))
                return f"tcp://127.0.0.1:{port}"


def _progress(status: dict[str, Any]) -> float:
    return status["trained"] / status["positions"] if status.get("positions") else 0.0


def figures(story: Story, verdict: Verdict, model: Path) -> dict[str, Any]:
    """The report's figures; its keys are what other programs may read."""
    net = byte_gpt.seeded_model()
    loss_start = byte_gpt.validation_loss(net)
    net.load_state_dict(load_file(model))
    steps = sum(member.steps for member in verdict.state.members.values())
    parameters = sum(parameter.numel() for parameter in net.parameters())
    return {
        "loss_start": round(loss_start, 4),
        "loss_end": round(byte_gpt.validation_loss(net), 4),
        "deltas_acknowledged": verdict.acknowledged,
        "deltas_lost": len(verdict.lost),
        "deltas_refused": story.newest["deltas"]["refused"],
        "samples_trained": verdict.samples,
        "samples_counted_twice": verdict.samples_twice,
        "verify": "ok" if verdict.is_ok else "failed",
        "bytes_wire": story.bytes_wire,
        # Each step of each worker sends a gradient and gets the sum back, four bytes a parameter each way.
        "bytes_data_parallel": steps * parameters * 4 * 2,
        "seconds": round(story.seconds, 1),
        "kills": [{"seconds": round(seconds, 1), "who": who} for seconds, who in story.kills],
    }


def show(report: dict[str, Any], paths: dict[str, Path], console: Console) -> None:
    table = Table(show_header=False, title="what came of it")
    saving = report["bytes_data_parallel"] / report["bytes_wire"]
    table.add_row("validation loss", f"{report['loss_start']:.2f} → [bold]{report['loss_end']:.2f}[/] nats/byte")
    table.add_row("deltas", f"{report['deltas_acknowledged']} acknowledged, {report['deltas_lost']} lost, "
                  f"{report['deltas_refused']} refused")  # fmt: skip
    table.add_row("samples", f"{report['samples_trained']} trained, {report['samples_counted_twice']} counted twice")
    table.add_row("verify", report["verify"])
    table.add_row("bytes on the wire", f"{report['bytes_wire'] / 1e6:.1f} MB, {saving:.0f} times fewer than the "
                  f"{report['bytes_data_parallel'] / 1e9:.1f} GB of fp32 data-parallel")  # fmt: skip
    table.add_row("killed", ", ".join(f"{kill['who']} at {kill['seconds']:.0f} s" for kill in report["kills"]))
    table.add_row("took", f"{report['seconds']:.0f} s")
    for name, path in paths.items():
        table.add_row(name, str(path))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path("runs/local"))
    parser.add_argument("--samples", type=int, default=72_000)
    options = parser.parse_args()
    console = Console()
    config = prepare(options.directory, options.samples)
    console.print(f"run in {config.directory}; what each process says is in its logs/", soft_wrap=True)
    conductor = Conductor(config)
    try:
        conductor.start_server()
        for site in SITES:
            conductor.start_site(site)
        with Live(console=console, auto_refresh=False) as screen:
            trio.run(conductor.conduct, screen)
    finally:
        conductor.stop()
    finish(conductor, console)


def finish(conductor: Conductor, console: Console) -> None:
    config, story = conductor.config, conductor.story
    paths = {name: config.directory / file for name, file in OUTPUTS.items()}
    looking.export(config, paths["model"])
    verdict = looking.verify_directory(config.log, lambda _: None)
    report = figures(story, verdict, paths["model"])
    paths["report"].write_text(json.dumps(report, indent=2) + "\n")
    points = [(0.0, report["loss_start"]), *story.losses, (report["seconds"], report["loss_end"])]
    kills = [(seconds, f"{who} killed") for seconds, who in story.kills]
    draw_loss(points, kills, paths["loss picture"], title="one model, three sites, two kills")
    show(report, paths, console)


if __name__ == "__main__":
    main()
