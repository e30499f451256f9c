"""Probing the model that joins: what its layers make of one input, on the parameters that the run began with.

Called by session.py in the user's thread, between the arrival of the run's parameters and the first step. The figures
are tensors/digest.py's; core/probing.py, on the server, compares them.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from hetero_async.core.probe import NOTHING, ProbeReport
from hetero_async.desk import Desk
from hetero_async.evaluation import unchanged
from hetero_async.shell.telemetry import note
from hetero_async.tensors import digest
from hetero_async.tensors.follower import Follower
from hetero_async.tensors.replica import Replica
from hetero_async.tensors.schema import unwrapped

# What the run began with may come over a thin link. A server that then says nothing for so long holds up no training;
# its word counts whenever it comes.
FETCH_SECONDS, ANSWER_SECONDS = 600.0, 30.0
REASON_LENGTH_MAX = 300


class Probing:
    def __init__(self, worker: str, model: torch.nn.Module, replica: Replica, batch: Any) -> None:
        """`batch`: what the model is called with (a tensor, or a tuple or dict of arguments); None: each layer is."""
        self._worker = worker
        self._model = unwrapped(model)
        self._replica = replica
        self._batch = batch

    def run(
        self, desk: Desk, follower: Follower, say: Callable[[ProbeReport], None], wait: Callable[[str], None]
    ) -> None:
        """Probe, and wait for the server's word on it. Raises RefusedError where that is a refusal."""
        until = time.monotonic() + FETCH_SECONDS
        while desk.lacks_initial and time.monotonic() < until:
            wait("fetching what the run began with")
        shown, follower.initial = follower.initial, None  # as large as the model, and not needed again
        if shown is None:
            note(self._worker, "not probed: the server did not send the parameters that the run began with")
            return
        report = self.report(shown.flat, shown.buffers)
        if report is None:
            note(self._worker, "not probed: none of its layers is torch's own; give join a batch (probe=…)")
            return
        say(report)
        until = time.monotonic() + ANSWER_SECONDS
        while desk.verdict is None and time.monotonic() < until:
            wait("waiting for what the server says to the probe")
        if desk.verdict is None:
            note(self._worker, f"no word from the server on the probe in {ANSWER_SECONDS:g} s: training begins")
        elif desk.verdict.reason:
            note(self._worker, desk.verdict.reason)

    def report(self, flat: object, buffers: object) -> ProbeReport | None:
        """What there is to say to the server of a model with these parameters and buffers; None where no layer could
        be looked at.

        The model, its buffers and all random states are what they were afterwards.
        """
        software = f"torch {torch.__version__}"
        device, dtype = self._replica.device, self._replica.dtype
        try:
            with unchanged(self._model), torch.no_grad():
                if self._batch is None:
                    with self._replica.calling(flat, buffers) as call:
                        found = digest.of_layers(self._model, device, dtype, call)
                else:
                    with self._replica.showing(flat, buffers):
                        found = digest.of_batch(self._model, self._batch, device, dtype)
        except digest.FAILURES as error:
            reason = f"{type(error).__name__}: {error}"[:REASON_LENGTH_MAX]
            return ProbeReport(incarnation=0, software=software, digest=NOTHING, reason=reason)
        return ProbeReport(incarnation=0, software=software, digest=found) if found.layers else None
