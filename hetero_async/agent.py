"""The workers of one site: started together, each started again when it dies."""

import functools
import os
import signal
from collections.abc import Sequence

import trio

from hetero_async.actors.supervisor import RestartWindow, supervise
from hetero_async.config import ENV_RUN, ENV_WORKER, RunConfig
from hetero_async.errors import UserError, WorkerDied
from hetero_async.ports import Observer
from hetero_async.shell.notify import keep_notified
from hetero_async.shell.signals import stop_on_signal

# A worker that dies more often than this within the period is not helped by starting it again.
WORKER_RESTARTS = 10
WORKER_RESTART_PERIOD_SECONDS = 60.0
WORKER_BACKOFF_SECONDS = 1.0
# torchrun gives its ranks 30 s to end; they would outlive it, were it killed before that.
WORKER_STOP_SECONDS = 40.0


async def work(config: RunConfig, site: str, command: Sequence[str], observer: Observer) -> None:
    """Start the site's workers, start again what dies, return when all have ended well."""
    if site not in config.sites:
        raise UserError(f'run.toml knows no site "{site}"; it has: {", ".join(sorted(config.sites)) or "none"}')
    children = {
        name: functools.partial(_run_worker, config, name, command, observer)
        for where, name in config.workers()
        if where == site
    }
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_on_signal, nursery.cancel_scope)
        nursery.start_soon(keep_notified)
        await supervise(
            children,
            RestartWindow(WORKER_RESTARTS, WORKER_RESTART_PERIOD_SECONDS),
            backoff_seconds=WORKER_BACKOFF_SECONDS,
            report=lambda report: observer.event("worker restarts", reason=str(report)),
        )
        nursery.cancel_scope.cancel()


async def _run_worker(config: RunConfig, name: str, command: Sequence[str], observer: Observer) -> None:
    """One life of one worker. Raises WorkerDied unless it ended with exit code 0."""
    environment = {**os.environ, ENV_RUN: str(config.path.resolve()), ENV_WORKER: name}
    directory = config.worker_directory(name)
    directory.mkdir(parents=True, exist_ok=True)
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(
            functools.partial(trio.run_process, list(command), env=environment, check=False, deliver_cancel=_stop)
        )
        (directory / "pid").write_text(str(process.pid))
        observer.event("worker started", worker=name, pid=process.pid)
    if process.returncode:
        raise WorkerDied(f"{name} ended with {_ending(process.returncode)}")
    observer.event("worker ended", worker=name)


async def _stop(process: trio.Process) -> None:
    process.terminate()
    await trio.sleep(WORKER_STOP_SECONDS)
    process.kill()


def _ending(returncode: int) -> str:
    return f"exit code {returncode}" if returncode > 0 else f"signal {signal.Signals(-returncode).name}"
