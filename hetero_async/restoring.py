"""`hetero-async restore`: a server's log and checkpoint from the archive alone.

Everything is fetched, put together and verified beside the place where it shall lie; the log appears there last, with
one rename. Interrupted before that, the same command goes on with what has been fetched.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from hetero_async.errors import ConfigError, LogCorrupt, UserError
from hetero_async.ports import Archive
from hetero_async.shell.archive import open_archive
from hetero_async.shell.disk import sync_directory
from hetero_async.shell.retrieval import History, Retrieval, lay_out, listed, written
from hetero_async.shell.segments import read_log
from hetero_async.shell.store import CheckpointStore
from hetero_async.shell.threads import in_thread
from hetero_async.tensors.model import ServerModel
from hetero_async.watch.verify import Verdict, verify

# Beside log and checkpoints, as long as they are not finished.
RESTORING = "restoring"


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What came back, that it is sound, and what of the archive was of no use."""

    history: History
    verdict: Verdict
    warnings: list[str]

    def lines(self, now: datetime) -> list[str]:
        """For people."""
        state = self.verdict.state
        old = now - self.history.stored_at
        return [
            *(f"warning     {warning}" for warning in self.warnings),
            *self.verdict.lines(),
            f"restored    {self.history.run}: record {state.lsn} of term {state.term}, version {state.version}",
            f"archived    {self.history.stored_at:%Y-%m-%d %H:%M:%S} UTC, {old.total_seconds():,.0f} s ago",
            "may lack    deltas acknowledged since: those are lost, and their samples will be trained on again",
        ]


def restore(
    directory: Annotated[Path, typer.Argument(help="Where log and checkpoints shall lie: the server's directory.")],
    archive: Annotated[
        str, typer.Option("--from", metavar="URL", help="s3://BUCKET/PREFIX, gs://…, az://… or a path.")
    ],
    run_name: Annotated[str, typer.Option(help="Which run, if the archive holds several.")] = "",
) -> None:
    """Rebuild a server's log and checkpoint from the archive, verify them, and say how fresh they are.

    Example: hetero-async restore my-run --from s3://bucket/prefix
    """
    with Progress(transient=True) as progress:
        fetching = progress.add_task("fetching", total=None)
        verifying = progress.add_task("verifying records", total=None)

        def fetched(name: str) -> None:
            progress.console.print(f"fetched     {name}", soft_wrap=True, highlight=False, markup=False)
            progress.advance(fetching)

        restored = restore_directory(
            directory, archive, run_name, fetched, lambda lsn: progress.update(verifying, completed=lsn)
        )
    for line in restored.lines(datetime.now(UTC)):
        print(line)


def restore_directory(
    directory: Path, url: str, run_name: str, fetched: Callable[[str], None], verified: Callable[[int], None]
) -> Restored:
    """Raises UserError, ArchiveAway, DiskFull, and LogCorrupt when what was archived does not keep the promises."""
    _refuse_used(directory)
    archive = open_archive(url, Path.cwd())
    run = run_name or _only_run(archive, url)
    staging = directory / RESTORING
    with written(staging):
        staging.mkdir(parents=True, exist_ok=True)
    retrieval = Retrieval(archive=archive, run=run, scratch=staging / "fetched", fetched=fetched)
    history = retrieval.find()
    lay_out(history, retrieval.scratch, staging)
    verdict = _verified(history, staging, verified)
    with written(directory):
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)
        for name in ("checkpoints", "log"):  # a directory with a log is finished
            os.replace(staging / name, directory / name)
            sync_directory(directory)
        shutil.rmtree(staging)
    return Restored(history=history, verdict=verdict, warnings=retrieval.warnings)


def _refuse_used(directory: Path) -> None:
    """What an interrupted restore left may go; nothing else."""
    staging = directory / RESTORING
    if (directory / "log").exists() and staging.exists() and not (staging / "log").exists():
        shutil.rmtree(staging)
        raise UserError(
            f"{directory}: an earlier restore was done with it; look with: hetero-async verify {directory}/log"
        )
    for name in ("log", "checkpoints"):
        path = directory / name
        is_ours = name == "checkpoints" and staging.exists()
        if path.exists() and not is_ours and any(path.iterdir()):
            raise ConfigError(f"{path}: there is something already; move it away, or choose another directory")


def _only_run(archive: Archive, url: str) -> str:
    runs = sorted({name.split("/")[0] for name in listed(archive) if "/" in name})
    if len(runs) != 1:
        found = f"holds {len(runs)} runs ({', '.join(runs)}): say which with --run-name" if runs else "holds no run"
        raise UserError(f"the archive {url} {found}")
    return runs[0]


def _verified(history: History, staging: Path, progress: Callable[[int], None]) -> Verdict:
    store = CheckpointStore(staging / "checkpoints", history.run, in_thread)
    checkpoint = store.load(history.checkpoint.lsn) if history.checkpoint else None
    entries = read_log(staging / "log", history.run, checkpoint.lsn if checkpoint else None)
    verdict = verify(checkpoint, entries, ServerModel(), [], progress)
    is_equal = checkpoint is None or verdict.records or verdict.model_hash == checkpoint.model.model_hash
    if not verdict.is_ok or not is_equal or verdict.state.lsn != history.lsn:
        raise LogCorrupt("\n".join([f"{staging}: what was archived does not keep the promises", *verdict.lines()]))
    return verdict
