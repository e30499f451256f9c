"""Runs one of the small examples: a server and two workers on this machine, then what came of it.

make run-example EXAMPLE=huggingface_trainer
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from conductor import clear, errors_in_one_line, free_address

from hetero_async import looking, roster
from hetero_async.config import RunConfig
from hetero_async.errors import HeteroAsyncError
from hetero_async.tables import template

EXAMPLES = Path(__file__).parent
SITE, WORKERS = "here", 2
SAMPLES = 8_000


def prepare(directory: Path, samples: int) -> RunConfig:
    clear(directory)
    text = template(
        run={"name": "example", "samples": samples},
        sites={SITE: WORKERS},
        server={"address": free_address(), "keep_log": True},
        training={"steps_per_round": 10},
    )
    return roster.initialize(directory, text)


def run(config: RunConfig, script: Path) -> None:
    """Raises HeteroAsyncError when the server or a worker ended badly."""
    program = [sys.executable, "-m", "hetero_async"]
    server = subprocess.Popen([*program, "serve", "--run", str(config.path), "--exit-when-finished"])
    try:
        work = [*program, "work", "--run", str(config.path), "--site", SITE, "--", sys.executable, str(script)]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # a worker each: more get in one another's way here
        if subprocess.run(work, check=False, env=one_thread).returncode or server.wait():
            raise HeteroAsyncError(f"{script.name} did not come to its end: see above")
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("example", help="its file's name without .py")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    options = parser.parse_args()
    script = EXAMPLES / f"{options.example}.py"
    if not script.exists():
        parser.error(f"there is no {script}")
    with errors_in_one_line():
        config = prepare(Path("runs") / options.example, options.samples)
        run(config, script)
        exported = config.directory / "model.safetensors"
        looking.export(config, exported)
        print("\n".join(looking.verify_directory(config.log, lambda _: None).lines()))
        print(f"exported to {exported}")


if __name__ == "__main__":
    main()
