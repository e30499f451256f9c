"""Commands that go on in the background while a test looks on."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TESTS = Path(__file__).parents[1]


@contextmanager
def background(output: Path, *command: object, **variables: object) -> Iterator[subprocess.Popen[bytes]]:
    """One command in a process group of its own, its words added to `output`; killed at the latest when the test is
    over. `variables`: of its environment, beside ours."""
    paths = os.pathsep.join([str(TESTS), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, **{name: str(value) for name, value in variables.items()}}
    with output.open("ab") as file:
        process = subprocess.Popen(
            list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
