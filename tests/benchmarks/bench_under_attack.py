"""How much slower honest workers get their deltas acknowledged while strangers and bad members attack the server.

Real processes and sockets: a server, two workers that train, and a process with every attack of tests/hostile at once.
Quiet and attacked stretches take turns in one run, and their rates are compared. The attackers run at the lowest
priority: they would not have our processors where they really are.
"""

import os
import time
from pathlib import Path
from threading import Event, Thread

import pytest
from e2e.harness import Life, Run
from hostile.attacks import FROM_OUTSIDE, FROM_WITHIN, Target
from hostile.test_memory import target_of

STRETCH_SECONDS = 20.0
TURNS = 3
HONEST = 2
LEAST_RATIO = 0.8


def attack_life(outside: Target, members: list[Target]) -> None:
    os.nice(19)
    stop = Event()
    jobs = [(attack, outside) for attack in FROM_OUTSIDE.values()]
    jobs += zip(FROM_WITHIN.values(), members, strict=True)
    threads = [Thread(target=attack, args=(target, stop)) for attack, target in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def acknowledged(run: Run) -> int:
    return len([delta for delta in run.deltas() if delta.worker in run.names[:HONEST]])


def counted(run: Run, seconds: float) -> int:
    before = acknowledged(run)
    time.sleep(seconds)
    return acknowledged(run) - before


@pytest.mark.timeout(600)
def test_under_attack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Run(tmp_path, workers=HONEST + len(FROM_WITHIN), samples=1_000_000, steps_per_round=8) as run:
        server = run.start_server()
        for name in run.names[:HONEST]:
            run.start_worker(name, awaited=run.names[:HONEST], step_seconds=0.04)
        run.wait(lambda: acknowledged(run) > 10, "the run has begun")
        members = [target_of(run, name) for name in run.names[HONEST:]]
        quiet = attacked = 0
        for _ in range(TURNS):
            quiet += counted(run, STRETCH_SECONDS)
            attackers = Life("attackers", tmp_path / "attackers.output", attack_life, target_of(run), members)
            run.lives.append(attackers)
            attacked += counted(run, STRETCH_SECONDS)
            attackers.kill()
        seconds = TURNS * STRETCH_SECONDS
        with capsys.disabled():
            print(
                f"\nacknowledged deltas of {HONEST} workers: {quiet / seconds:.2f}/s quiet, {attacked / seconds:.2f}/s "
                f"under {len(FROM_OUTSIDE) + len(FROM_WITHIN)} attacks at once: ratio {attacked / quiet:.2f}"
            )
            told = [line for line in server.said.splitlines() if "strangers" in line or "refused" in line]
            print(f"the server said {len(told)} lines about them in {2 * seconds:.0f} s")
        assert attacked >= LEAST_RATIO * quiet
