"""What a trial came to, from what its workers wrote down. All times are seconds from the first step of any worker."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from workload import BATCH, BUDGET_STEPS, MODELS, SPEEDS, STEP_SECONDS, STEPS, byte_gpt, read_parameters

# Of a run's kept models so many are evaluated, on so many windows of the validation text.
MODELS_EVALUATED_MAX = 20
VALIDATION = {"batches": 4, "batch_size": 64}


def notes(directory: Path) -> list[dict[str, Any]]:
    """All workers' steps in the order of time."""
    found = [{"worker": worker, **note} for worker in SPEEDS for note in _lines(directory / f"{worker}.{STEPS}")]
    return sorted(found, key=lambda note: note["time"])


def models(directory: Path) -> list[dict[str, Any]]:
    return sorted(_lines(directory / MODELS), key=lambda model: model["time"])


def curve(directory: Path, start: float) -> list[tuple[float, float, float]]:
    """(seconds, steps in the model, validation loss) of kept models, the last one among them."""
    kept = models(directory)
    spacing = max(1, -(-len(kept) // MODELS_EVALUATED_MAX))
    chosen = kept[::-1][::spacing][::-1]
    torch.set_num_threads(1)
    model = byte_gpt.seeded_model()
    points = [(0.0, 0.0, round(byte_gpt.validation_loss(model, **VALIDATION), 4))]
    for each in chosen:
        read_parameters(directory / each["file"], model)
        loss = byte_gpt.validation_loss(model, **VALIDATION)
        points.append((round(each["time"] - start, 2), round(each["steps"], 1), round(loss, 4)))
    return points


def longest_stall(directory: Path, healthy: set[str], end: float) -> tuple[float, str]:
    """The longest time between two steps of a worker that lived, less its step's own time, and whose it was.

    `end`: up to which a worker that has stopped stepping stands still; 0 where the run came to its end.
    """
    stalls = [(0.0, "")]
    for worker in sorted(healthy):
        times = [note["time"] for note in _lines(directory / f"{worker}.{STEPS}")]
        if end and times:
            times.append(end)
        own = STEP_SECONDS * SPEEDS[worker]
        stalls += [(round(after - before - own, 2), worker) for before, after in itertools.pairwise(times)]
    return max(stalls)


def result(trial: Any) -> dict[str, Any]:
    """Of a trial that has been run."""
    directory: Path = trial.directory
    stepped, kept = notes(directory), models(directory)
    if not stepped:
        return {"error": last_words(directory), "kills": [], "curve": []}
    start = stepped[0]["time"]
    reached = kept[-1]["steps"] if kept else 0
    is_finished = reached >= BUDGET_STEPS
    killed = {name for _, name in trial.kills}
    stall, whose = longest_stall(directory, set(SPEEDS) - killed, 0.0 if is_finished else trial.ended)
    return {
        "seconds_to_first_step": round(start - trial.started, 1),
        "seconds": round((kept[-1]["time"] if is_finished else trial.ended) - start, 1),
        "finished": is_finished,
        "megabytes_sent": round(trial.bytes_sent / 1e6, 1),
        "stall_seconds": stall,
        "stalled": whose,
        "steps_trained": len(stepped),
        "steps_in_model": round(reached, 1),
        "samples_per_step": BATCH,
        "kills": [(round(at - start, 1), name) for at, name in trial.kills],
        "started_again": {name: times for name, times in trial.starts.items() if times},
        "curve": curve(directory, start),
    }


def last_words(directory: Path) -> Mapping[str, str]:
    """What the processes of a trial that never began said last."""
    logs = {path.stem: path.read_text(errors="replace").splitlines() for path in sorted(directory.glob("*.log"))}
    return {name: lines[-1] for name, lines in logs.items() if lines}


def _lines(path: Path) -> list[dict[str, Any]]:
    """Of a file that may still be written."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]
