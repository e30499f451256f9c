"""The command line: one function a verb, each thin. What they call is in assembly.py."""

import contextlib
import itertools
import json
import math
import os
import secrets
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import trio
import typer
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from hetero_async import agent, assembly, cli_keys, cli_log, looking
from hetero_async.complaints import SERVER
from hetero_async.config import RunConfig
from hetero_async.errors import (
    EXIT_CORRUPT,
    EXIT_DEPOSED,
    Deposed,
    HeteroAsyncError,
    LogCorrupt,
    UserError,
    first_error,
)
from hetero_async.repairing import repair, told_how_to_mend
from hetero_async.restoring import restore
from hetero_async.roster import join_line
from hetero_async.shell.dial import until_stopped
from hetero_async.shell.memory import told_of_memory
from hetero_async.shell.telemetry import LineObserver
from hetero_async.sim import learning, runner
from hetero_async.tables import template
from hetero_async.watch.status import Rate, render
from hetero_async.watch.tally import render_failure, render_tally

EXIT_USER = 2
EXIT_FAILED = 1
EXIT_CODES: dict[type, int] = {LogCorrupt: EXIT_CORRUPT, Deposed: EXIT_DEPOSED}
# Records that come by the dozen each second: in the log for good, not on the screen.
QUIET = frozenset({"leased", "beacon", "stepped", "published", "delta", "metric", "refused"})
STATUS_EVERY_SECONDS = 1.0

app = typer.Typer(
    help="Train one PyTorch model on accelerators in several datacentres, and lose nothing.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
RunOption = Annotated[Path, typer.Option("--run", help="The run's run.toml.")]


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")] = False) -> None:
    """Read by `main`, before typer looks at anything."""


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(help="Where run.toml, keys, log and outboxes will lie.")] = Path(),
    name: Annotated[str, typer.Option(help="The run's name.")] = "my-run",
    site: Annotated[list[str] | None, typer.Option(help="NAME=WORKERS, once for each site.")] = None,
    samples: Annotated[int, typer.Option(help="How many samples to train on in all.")] = 200_000,
    address: Annotated[str, typer.Option(help="Where the workers reach the server.")] = "tcp://127.0.0.1:7710",
) -> None:
    """Write a commented run.toml and the server's keys, and print the address by which sites join.

    Example: hetero-async init my-run --samples 500000 --address tcp://server.example:7710

    With --site it makes the keys of that site's workers too, all in one place: for a run on one machine, or for files
    that you carry to the sites yourself.
    """
    sites = dict(_site(given) for given in site or [])
    text = template(run={"name": name, "samples": samples}, sites=sites, server={"address": address})
    config = assembly.initialize(directory, text)
    print(f"wrote {config.path} and the keys of the server, the operator and {len(config.workers())} workers")
    print(f"next: hetero-async serve --run {config.path}")
    for name in sites:
        print(f"      hetero-async work --run {config.path} --site {name} -- python train.py")
    print(f"on the host of another site:\n      {join_line(config)}")
    if address.startswith("tcp://127."):
        print("(127.… is reached from this machine alone; for others: init --address tcp://HOST:PORT)")


def _site(given: str) -> tuple[str, int]:
    name, _, workers = given.partition("=")
    if not workers.isdigit():
        raise UserError(f'--site {given}: must be NAME=WORKERS, for example "--site amsterdam=2"')
    return name, int(workers)


@app.command()
def serve(
    run: RunOption = Path("run.toml"),
    name: Annotated[str, typer.Option(help="Which node this is; a standby that was promoted, by its name.")] = SERVER,
    exit_when_finished: Annotated[bool, typer.Option(help="End when the run is trained and all have left.")] = False,
) -> None:
    """Run the parameter server; after a crash, start it again with the same words.

    Example: hetero-async serve --run my-run/run.toml
    """
    with told_how_to_mend(run, name):
        trio.run(assembly.serve_run, RunConfig.load(run), name, exit_when_finished, LineObserver(QUIET))


@app.command()
def standby(
    name: Annotated[str, typer.Option(help="Which one this is: a [standbys.NAME] of run.toml, or server.")],
    run: RunOption = Path("run.toml"),
    exit_when_finished: Annotated[bool, typer.Option(help="End when the run is trained and all have left.")] = False,
) -> None:
    """Follow the server's log in another site, and take its place when it is gone.

    Example: hetero-async standby --name b --run my-run/run.toml
    """
    with told_how_to_mend(run, name):
        trio.run(assembly.stand_by_run, RunConfig.load(run), name, exit_when_finished, LineObserver(QUIET))


@app.command()
def promote(
    name: Annotated[str, typer.Option(help="The standby that shall serve: a [standbys.NAME] of run.toml, or server.")],
    run: RunOption = Path("run.toml"),
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask, whatever would be lost.")] = False,
) -> None:
    """Make a standby of this host the server: says what would be lost, if anything, and asks.

    A server that is in reach hands over first, and nothing is lost. Example: hetero-async promote --name b
    """
    config = RunConfig.load(run)
    against = trio.run(looking.promote, config, name, yes)
    if against and not yes:
        print("\n".join(against))
        if not typer.confirm(f"make {name} the server all the same?"):
            raise UserError(f"{name} stays a standby")
        against = trio.run(looking.promote, config, name, True)
    if against:
        raise UserError("; ".join(against))
    print(f"{name} takes over; see it with: hetero-async status --run {run}")


@app.command(context_settings={"allow_interspersed_args": False})
def work(
    command: Annotated[list[str], typer.Argument(help="The training script, after --.")],
    site: Annotated[str, typer.Option(help="The site whose workers to start, as in run.toml.")],
    run: RunOption = Path("run.toml"),
) -> None:
    """Start the workers of one site, and start again those that die.

    Example: hetero-async work --site amsterdam -- python train.py --dtype bf16
    """
    trio.run(agent.work, RunConfig.load(run), site, command, LineObserver())


@app.command()
def status(
    run: RunOption = Path("run.toml"),
    as_json: Annotated[bool, typer.Option("--json", help="Print it once, as one JSON object.")] = False,
    watch: Annotated[bool, typer.Option(help="Keep the table on the screen until interrupted.")] = False,
) -> None:
    """Show how the run stands: who works, how fast, and what it has come to.

    Example: hetero-async status --run my-run/run.toml --watch
    """
    trio.run(_status, RunConfig.load(run), as_json, watch)


async def _status(config: RunConfig, as_json: bool, watch: bool) -> None:
    console = Console()
    rate = Rate()
    live = Live(console=console, auto_refresh=False) if watch else contextlib.nullcontext()
    with live as screen:
        how_long = until_stopped if watch else looking.for_one_question
        async with looking.open_status(config, LineObserver(), how_long) as ask:
            while True:
                answer = await ask()
                if answer is None and not watch:
                    raise HeteroAsyncError(looking.why_no_status(config))
                if answer is not None and isinstance(screen, Live):
                    screen.update(render(rate.added_to(answer, time.monotonic())), refresh=True)
                elif as_json:
                    print(json.dumps(answer))
                elif answer is not None:
                    console.print(render(answer))
                if not watch:
                    return
                await trio.sleep(STATUS_EVERY_SECONDS)


app.command("join-site", cls=cli_keys.WithScript)(cli_keys.join_site)
app.add_typer(cli_keys.app, name="keys")


@app.command()
def verify(log: Annotated[Path, typer.Argument(metavar="LOG_DIR", help="The run's log directory.")]) -> None:
    """Recompute the run from its log and check every promise; changes nothing, the server may be running.

    Example: hetero-async verify my-run/log
    """
    with Progress(transient=True) as progress:
        task = progress.add_task("records", total=None)
        verdict = looking.verify_directory(log, lambda lsn: progress.update(task, completed=lsn))
    for line in verdict.lines():
        print(line)
    if not verdict.is_ok:
        raise LogCorrupt(f"{log} does not keep the promises: see above")


@app.command()
def export(
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors")],
    run: RunOption = Path("run.toml"),
) -> None:
    """Write the newest parameters under the model's own names.

    Example: hetero-async export model.safetensors; then model.load_state_dict(load_file("model.safetensors"))
    """
    state = looking.export(RunConfig.load(run), out)
    print(f"wrote {out}: version {state.version}")


app.command()(restore)
app.command()(repair)
app.command()(cli_log.audit)
app.command()(cli_log.replay)


@app.command()
def sim(
    seed: Annotated[int | None, typer.Option(help="Run this one world and show every event.")] = None,
    faults: Annotated[str, typer.Option(help='With --seed: only these of its faults ("2,5", or "none").')] = "",
    seeds: Annotated[str, typer.Option(metavar="A..B", help="Run the worlds from A to B - 1.")] = "",
    minutes: Annotated[float, typer.Option(help="Run new worlds for so long.")] = 0.0,
    world: Annotated[Path | None, typer.Option(metavar="FILE.toml", help="Train in the world described there.")] = None,
    out: Annotated[Path, typer.Option(help="With --world: where its figures and its picture go.")] = Path(
        "runs/worlds"
    ),
    processes: Annotated[int, typer.Option(help="How many at once; 0: one a core.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON object.")] = False,
) -> None:
    """Run the real code in simulated worlds where everything fails, and check every promise.

    Example: hetero-async sim --seeds 0..1000

    With --world it trains a real model in a world of your making instead, in virtual time, and draws how fast it
    learned: which rule, which codec, which link. Example: hetero-async sim --world examples/worlds/rules.toml
    """
    if world is not None:
        _study(world, out, processes, as_json)
    elif seed is not None:
        _sim_one(seed, _numbers(faults), as_json)
    elif seeds or minutes:
        first, stop = _stretch(seeds) if seeds else (secrets.randbelow(1 << 32), None)
        worlds = itertools.count(first) if stop is None else range(first, stop)
        _sim_many(worlds, processes or os.cpu_count() or 1, 60 * minutes or math.inf, as_json)
    else:
        raise UserError("say which worlds: --seed 7, --seeds 0..1000, --minutes 10 or --world FILE.toml")


def _study(world: Path, out: Path, processes: int, as_json: bool) -> None:
    done = learning.study(world, out, lambda line: print(line, file=sys.stderr), processes)
    if as_json:
        print(json.dumps(done.summary()))
    else:
        for line in done.lines():
            print(line)
    if done.problems:
        raise HeteroAsyncError(f"{len(done.problems)} runs did not come to their end: {done.problems[0]}")


def _sim_one(seed: int, faults: list[int] | None, as_json: bool) -> None:
    outcome = runner.run_seed(seed, faults, None if as_json else print)
    tally = runner.Tally()
    tally.add(outcome)
    if outcome.violation is not None:
        tally.failures.append(runner.examine(outcome, faults))
    _tell(tally, as_json)


def _sim_many(worlds: Iterable[int], processes: int, seconds: float, as_json: bool) -> None:
    with Progress(
        TextColumn("{task.fields[told]}"),
        BarColumn(),
        TimeElapsedColumn(),
        transient=True,
        console=Console(stderr=True),
    ) as progress:
        total = len(worlds) if isinstance(worlds, range) else None
        task = progress.add_task("worlds", total=total, told="starting")
        tally = runner.run_many(
            worlds,
            processes,
            seconds,
            lambda so_far: progress.update(
                task, completed=so_far.seeds, told=f"{so_far.seeds} worlds, {so_far.acknowledged:,} deltas acknowledged"
            ),
        )
    _tell(tally, as_json)


def _tell(tally: runner.Tally, as_json: bool) -> None:
    summary = tally.summary()
    if as_json:
        print(json.dumps(summary))
    else:
        console = Console()
        for told, failure in zip(summary["failures"], tally.failures, strict=True):
            # A command that is broken into lines cannot be copied.
            console.print(render_failure(told, failure.recent), soft_wrap=True)
        console.print(render_tally(summary))
    if tally.failures:
        raise HeteroAsyncError(f"{len(tally.failures)} of {tally.seeds} worlds broke a promise")


def _numbers(faults: str) -> list[int] | None:
    if faults in ("", "none"):
        return [] if faults else None
    if not all(number.isdigit() for number in faults.split(",")):
        raise UserError(f'--faults {faults}: must be numbers as a failure names them, "2,5", or "none"')
    return [int(number) for number in faults.split(",")]


def _stretch(seeds: str) -> tuple[int, int]:
    first, dots, stop = seeds.partition("..")
    if not (first.isdigit() and dots and stop.isdigit() and int(first) < int(stop)):
        raise UserError(f'--seeds {seeds}: must be A..B with A below B, for example "0..1000"')
    return int(first), int(stop)


def main() -> None:
    """Run a verb; an error is one line and an exit code, a traceback only with --debug."""
    failure: HeteroAsyncError | None = None
    try:
        app()
    except* HeteroAsyncError as group:
        failure = first_error(group)
    except* (MemoryError, RuntimeError) as group:
        if not (told := told_of_memory(first_error(group))):
            raise
        failure = HeteroAsyncError(told)
    if failure is not None:
        if "--debug" in sys.argv:
            traceback.print_exception(failure)
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(EXIT_CODES.get(type(failure), EXIT_USER if isinstance(failure, UserError) else EXIT_FAILED))
