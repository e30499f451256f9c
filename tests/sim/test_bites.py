"""A simulation that finds nothing may be looking at nothing: each of these known faults in the code must be found.

Each mutant runs in a process of its own that lets the real package go, worlds 0, 1, … until one of them fails.
"""

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from e2e.harness import FORKS, start_fork_server
from sim.mutants import MUTANTS, Mutant, seeds_until_caught

# So many worlds may a mutant survive at most.
SEEDS_MAX = 25
AT_ONCE = 1


@pytest.fixture(scope="module")
def caught(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """By mutant: worlds it took, and what broke."""
    start_fork_server()
    with ProcessPoolExecutor(AT_ONCE, mp_context=FORKS, max_tasks_per_child=1) as pool:
        running = {
            mutant.name: pool.submit(seeds_until_caught, mutant, tmp_path_factory.mktemp("mutant"), SEEDS_MAX)
            for mutant in MUTANTS
        }
        return {name: future.result() for name, future in running.items()}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_simulation_finds(mutant: Mutant, caught: dict[str, tuple[int, str]]) -> None:
    seeds, what = caught[mutant.name]
    assert what, f"{SEEDS_MAX} worlds, and nothing broke"
    print(f"{mutant.name}: world {seeds}: {what}")


def test_every_mutant_is_another_file_than_the_real_one(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="times"):
        seeds_until_caught(Mutant("none", "serve.py", "there is no such line", ""), tmp_path, 1)
