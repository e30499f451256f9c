"""A run's curves as TensorBoard shows them: figures by who measured them, and the run's own, against its version.

Needs `tensorboard`, which comes with the extra of that name; nothing else in the package does. following.py feeds it.
"""

import time
from pathlib import Path
from typing import Any

from hetero_async.core import ranges
from hetero_async.core.records import Entry, Metric, Stepped
from hetero_async.core.state import State
from hetero_async.errors import UserError

# The directory of the run's own curves; no worker has a name without a number.
RUN = "run"


class Curves:
    """Event files below `directory`: one subdirectory for the run, one for each worker that has measured something."""

    def __init__(self, directory: Path) -> None:
        """Raises UserError when TensorBoard is not installed, and for a directory that has event files."""
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2  # type: ignore[import-untyped]
            from tensorboard.summary.writer import event_file_writer  # type: ignore[import-untyped]
        except ImportError:
            raise UserError(
                "curves for TensorBoard need it; install it with: pip install 'hetero-async[tensorboard]'"
            ) from None
        if next(directory.glob("*/events.out.tfevents.*"), None) is not None:
            raise UserError(f"{directory} has curves already, which would be shown twice; remove it, or name another")
        self._events, self._summaries, self._files = event_pb2, summary_pb2, event_file_writer
        self._directory = directory
        self._writers: dict[str, Any] = {}
        self.points = 0

    def see(self, entry: Entry, state: State) -> None:
        """An entry, and the state that it led to."""
        match entry.record:
            case Metric(worker=worker, name=name, value=value, version=version):
                self._add(worker, name, value, version)
            case Stepped(version=version, deltas=deltas):
                self._add(RUN, "samples_trained", ranges.size(state.ledger.trained), version)
                self._add(RUN, "staleness", state.lag, version)
                self._add(RUN, "deltas_merged", len(deltas), version)
                self._add(RUN, "workers", len(state.active), version)

    def _add(self, series: str, name: str, value: float, version: int) -> None:
        if series not in self._writers:
            self._writers[series] = self._files.EventFileWriter(str(self._directory / series))
        scalar = self._summaries.Summary.Value(tag=name, simple_value=value)
        # The log knows no time of day: this is when it was read.
        self._writers[series].add_event(
            self._events.Event(wall_time=time.time(), step=version, summary=self._summaries.Summary(value=[scalar]))
        )
        self.points += 1

    def flush(self) -> None:
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
