"""The command line: one function a verb, each thin.

Loading torch takes seconds. What needs it is imported by the verbs that use it, so that all others answer at once.
"""

import contextlib
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated

import trio
import typer
from rich.console import Console
from rich.live import Live
from rich.progress import Progress

from hetero_async import agent, asking, cli_keys, cli_log, roster
from hetero_async.cli_sim import sim
from hetero_async.cli_study import study
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
from hetero_async.tables import template
from hetero_async.watch.status import Rate, render

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
    config = roster.initialize(directory, text)
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
    from hetero_async import assembly

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
    from hetero_async import assembly

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
    against = trio.run(asking.promote, config, name, yes)
    if against and not yes:
        print("\n".join(against))
        if not typer.confirm(f"make {name} the server all the same?"):
            raise UserError(f"{name} stays a standby")
        against = trio.run(asking.promote, config, name, True)
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
        how_long = until_stopped if watch else asking.for_one_question
        async with asking.open_status(config, LineObserver(), how_long) as ask:
            while True:
                answer = await ask()
                if answer is None and not watch:
                    raise HeteroAsyncError(asking.why_no_status(config))
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
    from hetero_async import looking

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
    best: Annotated[bool, typer.Option("--best", help="Instead: those that were measured best (keep_best).")] = False,
) -> None:
    """Write the newest parameters under the model's own names.

    Example: hetero-async export model.safetensors; then in Python ha.load("model.safetensors", model)
    """
    from hetero_async import looking

    if best:
        kept = looking.export_best(RunConfig.load(run), out)
        print(f"wrote {out}: version {kept.version}, {kept.name} {kept.value:.6g}")
        return
    state = looking.export(RunConfig.load(run), out)
    print(f"wrote {out}: version {state.version}")


app.command()(restore)
app.command()(repair)
app.command()(cli_log.audit)
app.command()(cli_log.replay)
app.command()(sim)
app.command()(study)


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
