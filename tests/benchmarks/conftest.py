"""One table of all that the benchmarks of a run have found, kept in build/bench.json."""

from collections.abc import Iterator

import pytest
from benchmarks.figures import KEPT, Figures


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> Iterator[Figures]:
    found = Figures()
    yield found
    found.keep()
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print()
        found.show()
        print(f"kept in {KEPT}")
