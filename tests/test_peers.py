"""How a comparison with other trainers is judged, from what its workers have written down."""

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

PEERS = Path(__file__).parent / "benchmarks/peers"


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Its modules find each other as scripts do."""
    monkeypatch.syspath_prepend(PEERS)
    import judge

    return judge


def noted(directory: Path, worker: str, *times: float) -> None:
    lines = [json.dumps({"time": time, "pid": 1, "steps": number, "loss": 3.0}) for number, time in enumerate(times, 1)]
    (directory / f"{worker}.steps.jsonl").write_text("\n".join([*lines, '{"time": 9']))  # killed while it wrote


def trial(directory: Path, **options: Any) -> SimpleNamespace:
    told: dict[str, Any] = {"kills": [], "started": 90.0, "ended": 130.0, "bytes_sent": 5_000_000, "starts": {}}
    return SimpleNamespace(directory=directory, **{**told, **options})


def test_the_longest_stall_is_a_healthy_workers_and_its_own_steps_do_not_count(
    judge: ModuleType, tmp_path: Path
) -> None:
    noted(tmp_path, "w0", 100.0, 100.04, 103.08)
    noted(tmp_path, "w3", 100.0, 100.16, 109.0)
    assert judge.longest_stall(tmp_path, {"w0"}, 0.0) == (3.0, "w0")
    assert judge.longest_stall(tmp_path, {"w0", "w3"}, 0.0) == (pytest.approx(8.68), "w3")
    assert judge.longest_stall(tmp_path, {"w0", "w1"}, 120.0) == (pytest.approx(16.88), "w0"), "it stepped no more"
    assert judge.longest_stall(tmp_path, {"w1"}, 120.0) == (0.0, "")


def test_a_trial_that_is_not_finished_stands_still_until_its_end(judge: ModuleType, tmp_path: Path) -> None:
    import workload

    noted(tmp_path, "w0", 100.0, 101.0)
    noted(tmp_path, "w1", 100.5)
    workload.keep(tmp_path, workload.byte_gpt.seeded_model(), 1, "w0")
    found = judge.result(trial(tmp_path, kills=[(101.5, "w1")], starts={"w1": 1, "w2": 0}))
    assert (found["finished"], found["seconds"], found["seconds_to_first_step"]) == (False, 30.0, 10.0)
    assert (found["stall_seconds"], found["stalled"]) == (28.96, "w0")
    assert (found["steps_trained"], found["steps_in_model"], found["megabytes_sent"]) == (3, 1, 5.0)
    assert (found["kills"], found["started_again"]) == ([(1.5, "w1")], {"w1": 1})
    first, last = found["curve"]
    assert first[2] == last[2], "nobody has trained the kept model"


def test_of_a_trial_that_never_began_the_last_words_are_kept(judge: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "w0.log").write_text("Traceback\nImportError: no module named torchft\n")
    (tmp_path / "w1.log").write_text("")
    assert judge.result(trial(tmp_path))["error"] == {"w0": "ImportError: no module named torchft"}
