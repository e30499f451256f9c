"""How a site's workers are told to stop."""

import os
import sys
from pathlib import Path

import pytest
import trio
from e2e.harness import PATIENCE_SECONDS, Silent

from hetero_async import agent, roster
from hetero_async.tables import template

# As torchrun does: it has children to end before it ends itself.
SLOW_TO_STOP = """
import pathlib, signal, time
signal.signal(signal.SIGTERM, lambda *_: pathlib.Path("told").touch())
pathlib.Path("ready").touch()
while not pathlib.Path("told").exists() or {is_stubborn}:
    time.sleep(0.01)
pathlib.Path("done").touch()
"""


@pytest.mark.parametrize("is_stubborn", [False, True])
def test_a_worker_may_end_by_itself_before_it_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_stubborn: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(agent, "WORKER_STOP_SECONDS", 0.2 if is_stubborn else PATIENCE_SECONDS)
    config = roster.initialize(tmp_path / "run", template(run={"name": "r", "samples": 9}, sites={"a": 1}))
    command = [sys.executable, "-S", "-c", SLOW_TO_STOP.format(is_stubborn=is_stubborn)]

    is_ready = Path("ready").exists

    async def stop_when_ready() -> None:
        with trio.fail_after(PATIENCE_SECONDS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(agent.work, config, "a", command, Silent())
                while not is_ready():  # noqa: ASYNC110
                    await trio.sleep(0.01)
                nursery.cancel_scope.cancel()

    trio.run(stop_when_ready)
    assert Path("told").exists()
    assert Path("done").exists() is not is_stubborn
    with pytest.raises(ProcessLookupError):
        os.kill(int((config.worker_directory("a-0") / "pid").read_text()), 0)
