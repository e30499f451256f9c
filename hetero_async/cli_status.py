"""The verbs that show how a run goes: status, curves. Thin, as those in cli.py, which lists them."""

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

import trio
import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from hetero_async import asking
from hetero_async.asking import Status
from hetero_async.config import RunConfig
from hetero_async.errors import HeteroAsyncError
from hetero_async.remains import status_on_disk
from hetero_async.shell.dial import until_stopped
from hetero_async.shell.telemetry import event_log
from hetero_async.watch.status import render
from hetero_async.watch.words import duration

STATUS_EVERY_SECONDS = 1.0

RunOption = Annotated[Path, typer.Option("--run", help="The run's run.toml.")]
Ask = Callable[[], Awaitable[Status | None]]


def status(
    run: RunOption = Path("run.toml"),
    as_json: Annotated[bool, typer.Option("--json", help="Print it as one JSON object on a line.")] = False,
    watch: Annotated[bool, typer.Option(help="Again and again, each second, until interrupted.")] = False,
) -> None:
    """Show how the run stands: does it learn, when will it end, who works, what holds the others up.

    Where nothing runs, it shows what log, checkpoints and notes of refusals on this host say, and ends with exit code
    1. Example: hetero-async status --run my-run/run.toml --watch
    """
    trio.run(_watch if watch else _show, RunConfig.load(run), as_json)


async def _show(config: RunConfig, as_json: bool) -> None:
    async with asking.open_status(config, event_log("status"), asking.for_one_question) as ask:
        answer = await ask()
    shown = answer or await trio.to_thread.run_sync(status_on_disk, config)
    if shown is not None:
        _print(Console(), shown, as_json)
    if answer is None:
        raise HeteroAsyncError(asking.why_no_status(config))


def _print(console: Console, status: Status, as_json: bool) -> None:
    if as_json:
        print(json.dumps(status), flush=True)
    else:
        console.print(render(status))


class LastReason:
    """Fulfils ports.Observer: why no server answers, for a screen that must not be written over."""

    def __init__(self) -> None:
        self.reason = ""

    def event(self, name: str, **fields: object) -> None:
        self.reason = str(fields.get("reason", self.reason))


async def _watch(config: RunConfig, as_json: bool) -> None:
    console, reason = Console(), LastReason()
    async with asking.open_status(config, reason, until_stopped) as ask:
        looks = Looks(config, ask, reason)
        if as_json or not console.is_terminal:
            while True:
                if shown := await looks.next():
                    _print(console, shown, as_json)
                await trio.sleep(STATUS_EVERY_SECONDS)
        shown = None
        try:
            # A screen of its own is drawn over in place, line by line, and never flickers.
            with Live(console=console, auto_refresh=False, screen=True) as screen:
                while True:
                    shown = await looks.next()
                    screen.update(render(shown) if shown else Text(asking.why_no_status(config)), refresh=True)
                    await trio.sleep(STATUS_EVERY_SECONDS)
        finally:
            if shown is not None:
                console.print(render(shown))


class Looks:
    """At a run, one after another: what it answers, else what it answered last, else what is on disk."""

    def __init__(self, config: RunConfig, ask: Ask, reason: LastReason) -> None:
        self._config = config
        self._ask = ask
        self._reason = reason
        self._last: Status | None = None
        self._answered_at = trio.current_time()

    async def next(self) -> Status | None:
        if (answer := await self._ask()) is not None:
            self._last, self._answered_at = answer, trio.current_time()
            return answer
        if self._last is None:
            self._last = await trio.to_thread.run_sync(status_on_disk, self._config)
        if self._last is None:
            return None
        silent = duration(trio.current_time() - self._answered_at)
        why = f": {self._reason.reason}" if self._reason.reason else ""
        return {**self._last, "state": f"no answer for {silent}{why}"}


def curves(
    run: RunOption = Path("run.toml"),
    tensorboard: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the event files go; show them with: tensorboard --logdir DIR")
    ] = Path("tensorboard"),
    watch: Annotated[bool, typer.Option(help="Follow the run until interrupted.")] = False,
) -> None:
    """Write the run's figures, its samples and their staleness for TensorBoard, against the run's version.

    Read off the log on this host; the server may be running. Example: hetero-async curves --tensorboard events --watch
    """
    from hetero_async.following import write_curves

    def told(points: int, lsn: int) -> None:
        shown.update(f"{points:,} points, up to record {lsn}")

    with Console(stderr=True).status("reading the log") as shown:
        write_curves(RunConfig.load(run), tensorboard, watch=watch, told=told)
    print(f"wrote {tensorboard}; see it with: tensorboard --logdir {tensorboard}")
