"""`hetero-async sim`: what a person reads of one world, of many, and of one that broke a promise."""

import json
import re
import secrets
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from hetero_async import cli
from hetero_async.sim import runner
from hetero_async.sim.chaos import Chaos
from hetero_async.sim.plan import ALL_FAULTS, Fault, draw
from hetero_async.sim.trace import RECENT_LINES
from hetero_async.sim.world import Outcome

# Once faults of both kinds have struck, the judge of these tests objects: the smallest schedule has one of each.
OBJECTIONABLE = ("kill worker", "double messages")
OBJECTION = "both have struck"
Verb = Callable[..., tuple[int, str, str]]


def sim(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hetero_async", "sim", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=250)


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Verb:
    """The same in this process, where a test may change the code: exit code, what was printed, and complained of."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hetero-async", "sim", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


def test_one_world_is_shown_and_many_are_counted(verb: Verb, monkeypatch: pytest.MonkeyPatch) -> None:
    many = sim("--seeds", "3..5", "--processes", "1")
    assert many.returncode == 0, many.stderr
    came: list[Outcome] = []

    def run_seed(*given: Any) -> Outcome:
        came.append(runner_run_seed(*given))
        return came[-1]

    runner_run_seed = runner.run_seed
    monkeypatch.setattr(runner, "run_seed", run_seed)
    for seed in "34":
        _, printed, _ = verb("--seed", seed)
        assert "chaos        heals everything" in printed
        assert row(printed, "seeds") == "1 run, 0 failed"
        assert figures(printed) == figures_of(came[-1:])
    assert row(many.stdout, "seeds") == "2 run, 0 failed"
    assert figures(many.stdout) == figures_of(came)
    assert sum(outcome.acknowledged for outcome in came) > 20
    hours = sum(outcome.virtual_seconds for outcome in came) / 3600
    assert re.fullmatch(rf"{hours:.1f} h in \d+ s", row(many.stdout, "virtual time"))
    assert float(row(many.stdout, "speed").removesuffix(" seeds/s")) > 0


def figures_of(outcomes: list[Outcome]) -> list[int]:
    deltas = [(outcome.acknowledged, outcome.lost, outcome.refused) for outcome in outcomes]
    struck = sum((outcome.faults for outcome in outcomes), start=Counter[str]())
    return [*map(sum, zip(*deltas, strict=True)), *(struck[kind] for kind in ALL_FAULTS)]


def figures(table: str) -> list[int]:
    """Deltas acknowledged, lost and refused; then how many faults of each kind struck."""
    acknowledged, lost, refused = re.findall(r"(\d[\d,]*) ", row(table, "deltas"))
    struck = [row(table, kind, "0") for kind in ALL_FAULTS]
    return [int(told.replace(",", "")) for told in (acknowledged, lost, refused, *struck)]


def row(table: str, name: str, absent: str = "") -> str:
    """What stands beside a name."""
    (told,) = re.findall(rf"^│ {name} +│ +(.+?) +│$", table, re.MULTILINE) or [absent]
    return str(told)


def test_worlds_are_run_for_as_long_as_was_said(verb: Verb, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worlds that were begun are run to their end."""
    monkeypatch.setattr(runner, "PARCEL", 1)
    monkeypatch.setattr(secrets, "randbelow", lambda below: 3)
    code, printed, complaint = verb("--minutes", "0.01", "--processes", "1", "--json")
    assert code == 0, complaint
    answer = json.loads(printed)
    assert 1 <= answer["seeds"] < 20
    assert (answer["failures"], answer["lost"]) == ([], 0)
    assert answer["acknowledged"] > 10
    assert answer["faults"]


# --- a world that broke a promise ---


@pytest.fixture
def objector(monkeypatch: pytest.MonkeyPatch) -> int:
    """A judge with a quirk, and the seed of a world for it: a short one."""
    strike = Chaos._strike

    async def objecting(chaos: Chaos, fault: Fault) -> None:
        await strike(chaos, fault)
        if all(chaos.done[kind] for kind in OBJECTIONABLE):
            chaos._world.judge.violated("1", OBJECTION)

    monkeypatch.setattr(Chaos, "_strike", objecting)
    monkeypatch.setenv("COLUMNS", "40")
    return min(filter(is_objectionable, range(300)), key=lambda seed: draw(seed).settings.samples)


def is_objectionable(seed: int) -> bool:
    """With several doubled messages, so that more than one schedule of two faults is."""
    plan = draw(seed)
    struck = Counter(fault.kind for fault in plan.faults)
    return not plan.standbys and len(struck) > 2 and struck["kill worker"] > 0 and struck["double messages"] > 1


def told(printed: str) -> dict[str, Any]:
    """What the picture of a failure consists of, read as a person would."""
    (failure,) = re.findall(
        r"^seed (\d+): invariant (\w+): (.+)\nthe last events:\n((?:  .+\n)+)faults that it needs: (\d+)\n"
        r"((?:  .+\n)*)see it again with: hetero-async (.+)$",
        printed,
        re.MULTILINE,
    )
    seed, invariant, what, events, count, faults, replay = failure
    return {
        "seed": int(seed), "invariant": invariant, "what": what, "events": events.splitlines(), "count": int(count),
        "faults": faults.splitlines(), "replay": replay.split(),
    }  # fmt: skip


def test_a_failure_is_shrunk_to_what_it_needs_and_its_command_shows_it_again(verb: Verb, objector: int) -> None:
    code, printed, complaint = verb("--seed", str(objector))
    first = told(printed)
    assert (code, complaint) == (1, "error: 1 of 1 worlds broke a promise\n")
    assert (first["seed"], first["invariant"], first["what"]) == (objector, "1", OBJECTION)
    assert "VIOLATED 1" in first["events"][-1]
    times = [float(line.split()[0]) for line in first["events"]]
    assert times == sorted(times)
    assert len(times) == RECENT_LINES
    assert row(printed, "seeds") == "1 run, 1 failed"
    faults = draw(objector).faults
    *command, given = first["replay"]
    assert command == ["sim", "--seed", str(objector), "--faults"]
    numbers = [int(number) for number in given.split(",")]
    assert sorted(faults[number].kind for number in numbers) == sorted(OBJECTIONABLE)
    assert first["count"] == len(numbers) < len(faults)
    assert first["faults"] == [f"  {faults[number].at:8.3f} s  {faults[number]}" for number in numbers]
    code, printed, _ = verb(*first["replay"][1:])
    assert code == 1
    assert told(printed) == first
    # Other faults will do instead of one that was left out; it does not come back.
    dispensable = next(number for number in numbers if faults[number].kind == "double messages")
    left = [number for number in range(len(faults)) if number != dispensable]
    code, printed, _ = verb("--seed", str(objector), "--faults", ",".join(map(str, left)))
    assert code == 1
    assert {int(number) for number in told(printed)["replay"][-1].split(",")} < {*left}


def test_a_failure_that_needs_no_fault_says_so(verb: Verb, monkeypatch: pytest.MonkeyPatch) -> None:
    heal = Chaos.run

    async def objecting(chaos: Chaos) -> None:
        chaos._world.judge.violated("3", OBJECTION)
        await heal(chaos)

    monkeypatch.setattr(Chaos, "run", objecting)
    code, printed, _ = verb("--seed", "3")
    assert code == 1
    failure = told(printed)
    assert (failure["count"], failure["faults"]) == (0, [])
    assert failure["replay"] == ["sim", "--seed", "3", "--faults", "none"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "say which worlds"),
        (("--seeds", "9..3"), "--seeds 9..3: must be A..B"),
        (("--seed", "3", "--faults", "x"), "--faults x: must be numbers"),
        (("--seed", "3", "--faults", "999"), "and no fault 999"),
    ],
)
def test_what_cannot_be_simulated_is_named(verb: Verb, words: tuple[str, ...], said: str) -> None:
    code, _, complaint = verb(*words)
    assert code == 2
    assert said in complaint
