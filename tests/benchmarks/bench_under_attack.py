"""How much slower honest workers get their deltas acknowledged while strangers and bad members attack the server.

Real processes and sockets: a server, two workers that train, and a process with every attack of tests/hostile at once.
Quiet and attacked stretches take turns in one run, and their rates are compared. The attackers run at the lowest
priority: they would not have our processors where they really are.
"""

import json
import os
import time
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from e2e.harness import Life, Run
from e2e.lives import ServerPlan, node_life
from hostile.attacks import FROM_OUTSIDE, FROM_WITHIN, Target
from hostile.test_memory import target_of

from hetero_async.shell import link

STRETCH_SECONDS = 20.0
TURNS = 3
HONEST = 2
LEAST_RATIO = 0.8
NOTE_SECONDS = 0.5
STRANGERS = "strangers"


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


def server_life(notes: str, *arguments: Any) -> None:
    """A server that notes down what it hears of whom, for as long as it lives."""
    links: list[link.ServerLink] = []
    begin = link.ServerLink.__init__

    def begun(self: link.ServerLink, *parts: Any) -> None:
        begin(self, *parts)
        links.append(self)

    link.ServerLink.__init__ = begun  # type: ignore[method-assign]
    Thread(target=note, args=(links, Path(notes)), daemon=True).start()
    node_life(*arguments)


def note(links: list[link.ServerLink], notes: Path) -> None:
    while True:
        time.sleep(NOTE_SECONDS)
        for listening in links:
            heard = {key.decode(): traffic.bytes_up for key, traffic in list(listening.traffic.items())}
            written = notes.with_suffix(".new")
            written.write_text(json.dumps({**heard, STRANGERS: listening.gate.strangers}))
            written.replace(notes)


def heard_more(before: dict[str, int], after: dict[str, int], members: list[Target]) -> dict[str, int]:
    """By attacking member and for all strangers: bytes and connections since."""
    names = [*(member.public.decode() for member in members), STRANGERS]
    return {name: after.get(name, 0) - before.get(name, 0) for name in names}


def acknowledged(run: Run) -> int:
    return len([delta for delta in run.deltas() if delta.worker in run.names[:HONEST]])


def counted(run: Run, seconds: float) -> int:
    before = acknowledged(run)
    time.sleep(seconds)
    return acknowledged(run) - before


@pytest.mark.timeout(600)
def test_under_attack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Run(tmp_path, workers=HONEST + len(FROM_WITHIN), samples=1_000_000, steps_per_round=8) as run:
        notes, output = tmp_path / "heard.json", tmp_path / "server.output"
        told = str(notes), str(run.config.path), ["serve"], str(output), ServerPlan()
        server = Life("server", output, server_life, *told)
        run.lives.append(server)
        for name in run.names[:HONEST]:
            run.start_worker(name, awaited=run.names[:HONEST], step_seconds=0.04)
        run.wait(lambda: acknowledged(run) > 10, "the run has begun")
        members = [target_of(run, name) for name in run.names[HONEST:]]
        quiet = attacked = 0
        for _ in range(TURNS):
            quiet += counted(run, STRETCH_SECONDS)
            before = json.loads(notes.read_text())
            attackers = Life("attackers", tmp_path / "attackers.output", attack_life, target_of(run), members)
            run.lives.append(attackers)
            attacked += counted(run, STRETCH_SECONDS)
            more = heard_more(before, json.loads(notes.read_text()), members)
            assert all(more.values()), f"somebody did not attack: {more}"
            attackers.kill()
        seconds = TURNS * STRETCH_SECONDS
        with capsys.disabled():
            print(
                f"\nacknowledged deltas of {HONEST} workers: {quiet / seconds:.2f}/s quiet, {attacked / seconds:.2f}/s "
                f"under {len(FROM_OUTSIDE) + len(FROM_WITHIN)} attacks at once: ratio {attacked / quiet:.2f}"
            )
            lines = [line for line in server.said.splitlines() if "strangers" in line or "refused" in line]
            print(f"the server said {len(lines)} lines about them in {2 * seconds:.0f} s")
        assert attacked >= LEAST_RATIO * quiet
