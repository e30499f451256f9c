"""Learning in the same world: one simulated run of real training, in virtual time.

The server, the workers and the tensors are the real ones; the judge is not there, for it costs more than the training,
and the faults of random worlds are where it belongs. studying.py runs many.
"""

import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hetero_async.sim.recorder import LearningWorld, Point
from hetero_async.sim.text import Reading
from hetero_async.sim.world import play
from hetero_async.sim.worldfile import Variant, titled

MEMORY = Path("/dev/shm")
LOSS_DIGITS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One variant with one seed, and what came of it. Losses are nats per byte; None: not a number."""

    variant: str
    case: str
    seed: int
    settings: Mapping[str, Any]  # all that makes its world what it is, defaults included
    text: str  # fingerprint
    parameters: int
    final_loss: float | None
    choosing_loss: float | None  # on text that nothing is reported of
    virtual_seconds: float
    versions: int
    bytes_up: int
    bytes_down: int
    acknowledged: int
    refused: int
    idle_share: float  # of the workers' time until there was nothing left to train on
    problem: str  # why it did not come to its end
    curve: tuple[tuple[float, int, int, int, float | None], ...]  # seconds, tokens, steps, version, loss

    def told(self) -> str:
        """For a person, one line."""
        loss = "no loss" if self.final_loss is None else f"loss {self.final_loss:.4f}"
        tokens = self.curve[-1][1] if self.curve else 0
        told = f"{titled(self.case, self.variant)}, seed {self.seed}: {loss}"
        told += f" after {self.virtual_seconds:,.1f} s and {tokens:,} tokens"
        told += f"; {self.refused} of {self.acknowledged + self.refused} deltas refused"
        return f"{told}; {self.problem}" if self.problem else told

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> "Run":
        """Raises TypeError for what is not a run."""
        return cls(**{**given, "curve": tuple(tuple(point) for point in given["curve"])})


def run(variant: Variant, seed: int) -> Run:
    """One simulated run, from its first step to its last publish. Raises UserError where its text is missing."""
    torch.set_num_threads(1)
    evaluation, model, corpus = variant.world.evaluation, variant.world.model, variant.corpus()
    reading = Reading(variant.shape(), model.seed + seed, evaluation.windows, corpus)
    memory = MEMORY if os.access(MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="hetero-async-", dir=memory) as scratch:
        lost = variant.world.lost_pushes
        world = LearningWorld(variant.plan(seed), Path(scratch) / "world", reading, evaluation.points, lost)
        play(world)
    violation, curve = world.judge.violation, world.recorder.curve
    final = curve[-1] if curve else Point(0.0, 0, 0, 0, math.nan)
    attended = world.worked_seconds + world.waited_seconds
    return Run(
        variant=variant.name,
        case=variant.case,
        seed=seed,
        settings=variant.settings(),
        text=corpus.fingerprint,
        parameters=reading.parameters,
        final_loss=_finite(final.loss),
        choosing_loss=_finite(world.recorder.choosing_loss),
        virtual_seconds=round(final.seconds, 3),
        versions=final.version,
        bytes_up=sum(end.bytes_up for end in world.ends),
        bytes_down=sum(end.bytes_down for end in world.ends),
        acknowledged=world.judge.acknowledged,
        refused=world.judge.refused,
        idle_share=round(world.waited_seconds / attended, 5) if attended else 0.0,
        problem=f"{violation.invariant}: {violation.what}" if violation else "",
        curve=tuple(
            (round(point.seconds, 3), point.tokens, point.steps, point.version, _finite(point.loss)) for point in curve
        ),
    )


def _finite(loss: float) -> float | None:
    return round(loss, LOSS_DIGITS) if math.isfinite(loss) else None
