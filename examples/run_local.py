"""The whole of hetero_async on one machine: a server, four workers in three sites, two kills, one model.

    make run-local

conductor.py starts the processes; here is what becomes of them: a worker is killed, then the server, which is started
again. It ends with the figures and a picture in runs/local.
"""

import json
import os
import signal
from pathlib import Path
from typing import Any

import trio
from conductor import (
    ONCE,
    SITES,
    TRAINING,
    VERIFIED,
    Conductor,
    Promise,
    clear,
    curve,
    end,
    errors_in_one_line,
    free_address,
    losses,
    options,
    outputs,
    show,
    told_kills,
)
from rich.console import Console
from rich.live import Live
from safetensors.numpy import load_file

from hetero_async import looking, roster
from hetero_async.config import RunConfig
from hetero_async.reporting import write_report
from hetero_async.tables import template
from hetero_async.watch.report import draw_loss
from hetero_async.watch.verify import Verdict

KILL_WORKER_AT, KILL_SERVER_AT = 0.3, 0.6
VICTIM = "amsterdam-1"
SERVER_AWAY_SECONDS = 3.0
SAMPLES = 72_000
# Nats a byte. So many samples bring it well below that, whoever is killed; nothing is promised of fewer.
LOSS_MAX = 2.2
PROMISES = (
    Promise(lambda report: report["deltas_lost"] == 0, "{deltas_lost} acknowledged deltas were lost"),
    ONCE,
    VERIFIED,
    Promise(
        lambda report: report["loss_end"] <= LOSS_MAX or report["samples_trained"] < SAMPLES,
        f"the validation loss is {{loss_end}} at the end, above {LOSS_MAX}",
    ),
)


class TwoKills(Conductor):
    """Kills one worker and the server on the way; over when all processes have ended by themselves."""

    def start_server(self) -> None:
        self.start("server", "serve", "--run", str(self.config.path), "--exit-when-finished")

    async def act(self) -> bool:
        if self.have_ended(*self.processes):
            return True
        if not self.story.kills and self.story.progress >= KILL_WORKER_AT:
            os.kill(int((self.config.worker_directory(VICTIM) / "pid").read_text()), signal.SIGKILL)
            self.story.killed(f"worker {VICTIM}")
        elif len(self.story.kills) == 1 and self.story.progress >= KILL_SERVER_AT:
            self.kill("server")
            self.story.killed("server")
            self.story.begin_life()
            await trio.sleep(SERVER_AWAY_SECONDS)
            self.start_server()
        return False


def prepare(directory: Path, samples: int) -> RunConfig:
    """A new run of three sites in `directory`; an earlier demo there goes away."""
    clear(directory)
    text = template(
        run={"name": "byte-gpt", "samples": samples},
        sites={site: workers for site, (workers, _, _) in SITES.items()},
        server={"site": "amsterdam", "keep_log": True, "address": free_address()},
        training=TRAINING,
    )
    return roster.initialize(directory, text)


def figures(conductor: TwoKills, verdict: Verdict, model: Path) -> dict[str, Any]:
    """The report's figures; its keys are what other programs may read."""
    story, steps = conductor.story, sum(member.steps for member in verdict.state.members.values())
    parameters = sum(parameter.size for parameter in load_file(model).values())
    return {
        **losses(model),
        "deltas_acknowledged": verdict.acknowledged,
        "deltas_lost": len(verdict.lost),
        "deltas_refused": story.counted["deltas_refused"],
        "samples_trained": verdict.samples,
        "samples_counted_twice": verdict.samples_twice,
        "verify": "ok" if verdict.is_ok else "failed",
        "bytes_wire": story.counted["bytes_wire"],
        # Each step of each worker sends a gradient and gets the sum back, four bytes a parameter each way.
        "bytes_data_parallel": steps * parameters * 4 * 2,
        "seconds": round(story.seconds, 1),
        "kills": told_kills(story),
    }


def rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    saving = report["bytes_data_parallel"] / report["bytes_wire"]
    acknowledged, lost, refused = (report[f"deltas_{fate}"] for fate in ("acknowledged", "lost", "refused"))
    wire, data_parallel = report["bytes_wire"] / 1e6, report["bytes_data_parallel"] / 1e9
    return [
        ("deltas", f"{acknowledged} acknowledged, {lost} lost, {refused} refused"),
        ("samples", f"{report['samples_trained']} trained, {report['samples_counted_twice']} counted twice"),
        ("verify", report["verify"]),
        (
            "bytes on the wire",
            f"{wire:.1f} MB, {saving:.0f} times fewer than the {data_parallel:.1f} GB of fp32 data-parallel",
        ),
        ("killed", ", ".join(f"{kill['who']} at {kill['seconds']:.0f} s" for kill in report["kills"])),
    ]


def main() -> None:
    given = options(__doc__, directory="runs/local", samples=SAMPLES)
    with errors_in_one_line():
        kill_two(prepare(given.directory, given.samples), given.device)


def kill_two(config: RunConfig, device: str) -> None:
    console = Console()
    console.print(f"run in {config.directory}; what each process says is in its logs/", soft_wrap=True)
    conductor = TwoKills(config, device)
    try:
        conductor.start_server()
        for site in SITES:
            conductor.start_site(site)
        with Live(console=console, auto_refresh=False) as screen:
            trio.run(conductor.conduct, screen, conductor.act)
    finally:
        conductor.stop()
    finish(conductor, console)


def finish(conductor: TwoKills, console: Console) -> None:
    config, story = conductor.config, conductor.story
    paths = outputs(config)
    looking.export(config, paths["model"])
    verdict = looking.verify_directory(config.log, lambda _: None)
    report = figures(conductor, verdict, paths["model"])
    paths["report"].write_text(json.dumps(report, indent=2) + "\n")
    write_report(config.path, paths["page"])
    kills = [(seconds, f"{who} killed") for seconds, who in story.kills]
    draw_loss(curve(report, story), kills, paths["loss picture"], title="one model, three sites, two kills")
    show(rows(report), report, paths, console)
    end(report, PROMISES)


if __name__ == "__main__":
    main()
