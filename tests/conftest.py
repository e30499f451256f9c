"""How much random testing: every test run tries some cases, `make soak` tries many more. And what is tested first."""

import gc
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings

# Begun last, each of these would be what all else waits for.
LONGEST = (
    "sim/test_worlds.py", "sim/test_bites.py", "network/test_takeover.py", "e2e/test_slow_link.py",
    "hostile/test_memory.py", "e2e/test_two_commands.py", "chaos/test_sweep.py", "e2e/test_cli.py",
)  # fmt: skip

# No deadlines: a busy machine is not a fault. The blob is what repeats a failing case.
settings.register_profile("everyday", deadline=None, print_blob=True)
settings.register_profile("soak", settings.get_profile("everyday"), max_examples=5000)
settings.load_profile("everyday")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """All that is collected stays: looking through it for garbage finds none."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--hypothesis-profile") != "soak":
        for item in items:
            if item.get_closest_marker("soak"):
                item.add_marker(pytest.mark.skip(reason="too long for everyday: `make soak` runs it"))
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))
