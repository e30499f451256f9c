"""Statuses as a server answers them, for the tests of what shows them."""

from typing import Any


def worker(**changes: Any) -> dict[str, Any]:
    usual = {
        "site": "amsterdam",
        "worker": "amsterdam-0",
        "device": "cpu",
        "dtype": "bf16",
        "state": "training",
        "incarnation": 1,
        "alive": True,
        "steps": 900,
        "steps_per_second": 31.4159,
        "steps_per_round": 32,
        "staleness": 0,
        "bytes_up": 12_345_678,
        "bytes_down": 987_654,
        "samples": 14_400,
        "deltas": 28,
        "refused": 0,
        "probe": "agrees",
        "seconds_since_heard": 0.3,
        "shares": {"training": 0.97, "answer_wait": 0.02, "sample_wait": 0.01, "link": 0.4},
        "usage": {
            "training_seconds": 970.0,
            "answer_wait_seconds": 20.0,
            "sample_wait_seconds": 10.0,
            "link_busy_seconds": 400.0,
            "upload_bytes_per_second": 6_200_000.0,
            "download_bytes_per_second": 11_900_000.0,
            "round_trip_seconds": 0.083,
        },
    }
    assert changes.keys() <= usual.keys()
    return {**usual, **changes}


def away(**changes: Any) -> dict[str, Any]:
    gone = {"state": "away", "alive": False, "shares": None, "steps_per_second": 0.0, "seconds_since_heard": 41}
    return worker(**{**gone, **changes})


def waiting(answer: float = 0.0, samples: float = 0.0, link: float = 0.0, **changes: Any) -> dict[str, Any]:
    shares = {"training": 1 - answer - samples, "answer_wait": answer, "sample_wait": samples, "link": link}
    return worker(shares=shares, **changes)


def figure(value: float = 2.0417, version: int = 55, **seen: Any) -> dict[str, Any]:
    return {"value": value, "version": version, **seen}


def status(**changes: Any) -> dict[str, Any]:
    usual = {
        "run": "byte-gpt",
        "state": "training",
        "term": 1,
        "server": "server",
        "version": 57,
        "publish": 56,
        "trained": 50_000,
        "positions": 200_000,
        "samples_per_second": 1234.5,
        "eta_seconds": 121.5,
        "deltas": {"acknowledged": 101, "refused": 2, "pending": 1},
        "refusals": {"too stale": 2},
        "metrics": {"validation_loss": figure()},
        "bytes": {"up": 1, "down": 2},
        "memory_bytes": 3,
        "disk_bytes": 4,
        "log": {"lsn": 400, "released": 399},
        "paused": "",
        "held": "",
        "state_hash": "ab",
        "workers": [
            worker(),
            worker(worker="amsterdam-1", dtype="fp32", staleness=3),
            away(site="office", worker="office-0", refused=2),
        ],
    }
    return {**usual, **changes}
