"""Brings a run's log and checkpoint back from the archive alone, and verifies them: what archiving.py took there."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from hetero_async.errors import LogCorrupt
from hetero_async.ports import Archive
from hetero_async.shell.disk import sync_directory
from hetero_async.shell.retrieval import History, Retrieval, lay_out, written
from hetero_async.shell.segments import read_log
from hetero_async.shell.store import CheckpointStore
from hetero_async.shell.threads import in_thread
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
            "to go on    hetero-async serve; where workers live on that were told of more, it halts and says how",
        ]


def restore_run(
    archive: Archive, run: str, directory: Path, fetched: Callable[[str], None], verified: Callable[[int], None]
) -> Restored:
    """Into a directory that has neither log nor checkpoints. Raises as `restore_directory` does."""
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


def _verified(history: History, staging: Path, progress: Callable[[int], None]) -> Verdict:
    from hetero_async.tensors.model import ServerModel  # it imports torch, see cli.py

    store = CheckpointStore(staging / "checkpoints", history.run, in_thread)
    checkpoint = store.load(history.checkpoint.lsn) if history.checkpoint else None
    entries = read_log(staging / "log", history.run, checkpoint.lsn if checkpoint else None)
    verdict = verify(checkpoint, entries, ServerModel(), [], progress)
    is_equal = checkpoint is None or verdict.records or verdict.model_hash == checkpoint.model.model_hash
    if not verdict.is_ok or not is_equal or verdict.state.lsn != history.lsn:
        raise LogCorrupt("\n".join([f"{staging}: what was archived does not keep the promises", *verdict.lines()]))
    return verdict
