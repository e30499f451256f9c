"""Statuses of a run as a server tells them, of as many workers and as late as one likes; the same every time."""

import math
import random
from typing import Any

SITES = ("amsterdam", "shanghai", "frankfurt", "office")
POSITIONS = 400_000_000


def status_at(second: float, *, workers: int = 4, term: int = 1, dead: frozenset[str] = frozenset()) -> dict[str, Any]:
    """So many seconds after the run began. Who is `dead` has been given up by the server."""
    chance = random.Random(int(second))
    rows = [_worker(number, second, chance, dead) for number in range(workers)]
    trained = sum(row["samples"] for row in rows)
    waited = {"not leased to it": int(second / 900), "its norm is far above the others'": int(second / 4000)}
    return {
        "run": "long-run",
        "state": "training",
        "term": term,
        "server": "server" if term == 1 else "b",
        "version": int(second / 20),
        "publish": int(second / 20),
        "trained": trained,
        "positions": POSITIONS,
        "deltas": {
            "acknowledged": sum(row["deltas"] for row in rows), "refused": sum(waited.values()), "pending": 0
        },
        "refusals": {cause: count for cause, count in waited.items() if count},
        "metrics": {
            "validation_loss": {"value": _loss(second // 60 * 60, chance), "version": int(second / 60) * 3}
        } if second >= 60 else {},
        "workers": rows,
        "durability": "replicated",
        "partner": "b",
        "standbys": [
            {"standby": "b", "lag": chance.choice([0, 0, 1, 3]), "in_reach": True, "seconds_since_heard": 0.1}
        ],
        "bytes": {"up": sum(row["bytes_up"] for row in rows), "down": sum(row["bytes_down"] for row in rows)},
        "quarantine": [],
        "log": {"lsn": int(second * 9), "released": int(second * 9) - chance.choice([0, 0, 2])},
    }  # fmt: skip


def _loss(second: float, chance: random.Random) -> float:
    noise = random.Random(second).gauss(0, 0.012)
    return 1.9 + 3.6 * math.exp(-((second / 2500) ** 0.6)) + noise


def _worker(number: int, second: float, chance: random.Random, dead: frozenset[str]) -> dict[str, Any]:
    site = SITES[number % len(SITES)]
    name = f"{site}-{number // len(SITES)}"
    speed = 1 + number % 4
    beats = int(second / (20 + number % 3))
    is_dead = name in dead
    return {
        "site": site,
        "worker": name,
        "device": "cuda (NVIDIA A100)",
        "dtype": "bf16",
        "state": "away" if is_dead else chance.choices(["training", "waiting for samples"], [25, 1 + number % 4])[0],
        "incarnation": 1,
        "alive": not is_dead,
        "steps": int(second * speed),
        "steps_per_second": 0.0 if is_dead else speed * 1.03,
        "steps_per_round": 20 * speed,
        "staleness": chance.choice([0, 0, 0, 1]),
        "bytes_up": beats * 1_250_000,
        "bytes_down": beats * 1_450_000,
        "samples": int(second * speed) * 8,
        "deltas": beats,
        "refused": 0,
        "seconds_since_heard": 0.4,
    }  # fmt: skip
