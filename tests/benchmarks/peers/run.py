"""The same training by us and by what a user would pick instead, through the same four scenarios.

    make bench-peers                                    whatever has no kept result yet, then the table
    python tests/benchmarks/peers/run.py --report       the table and the picture, from the kept results
    python tests/benchmarks/peers/run.py --only torchft --scenario open --again

Four real processes with steps of 40, 40, 80 and 160 ms, each on a host of its own (a network namespace; needs root),
train examples/byte_gpt.py's model on the same samples a budget of steps, or as long as LIMIT_SECONDS. Each peer has its
own virtual environment in build/peers, made from requirements/, and is set up as its own documentation says; its file
here says how, and where that stands.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
import ddp
import flower_fedavg
import hivemind_peer
import ours
import report
import torchft_diloco
from judge import result
from network.sites import why_not
from places import ENVIRONMENTS
from trial import SCENARIOS, Trial

HERE = Path(__file__).parent
RESULTS = HERE / "results"
# What is there for one scenario only.
ONLY_IN = {"hetero_async, standby": "coordinator killed"}
# name → its file, what that is told, and its environment
PEERS: dict[str, tuple[ModuleType, dict[str, Any], str]] = {
    "hetero_async": (ours, {"standby": False}, ""),
    "hetero_async, standby": (ours, {"standby": True}, ""),
    "torchft": (torchft_diloco, {}, "torchft"),
    "hivemind": (hivemind_peer, {"mode": "synchronous"}, "hivemind"),
    "hivemind, delayed": (hivemind_peer, {"mode": "delayed"}, "hivemind"),
    "Flower": (flower_fedavg, {}, "flower"),
    "DDP": (ddp, {}, "torchft"),
}


def install(environment: str) -> None:
    """Make a peer's environment, once."""
    directory = ENVIRONMENTS / environment
    if not environment or (directory / "installed").exists():
        return
    print(f"installing {environment} into {directory} ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    pinned = HERE / "requirements" / f"{environment}.txt"
    subprocess.run([directory / "bin" / "python", "-m", "pip", "install", "--quiet", "-r", pinned], check=True)
    (directory / "installed").touch()


def file_of(peer: str, scenario: str) -> Path:
    words = f"{peer} {scenario}".replace("/", "").replace(",", "").lower().split()
    return RESULTS / ("-".join(words) + ".jsonl")


def run(peer: str, scenario: str, *, keep: bool) -> None:
    """One trial, added to its file of results."""
    module, options, environment = PEERS[peer]
    install(environment)
    directory = Path(tempfile.mkdtemp(prefix="peers-", dir="/tmp"))
    trial = Trial(module, options, SCENARIOS[scenario], directory)
    trial.run()
    about = {
        "peer": peer,
        "scenario": scenario,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": round(os.getloadavg()[0], 1),
        **result(trial),
        "remarks": module.remarks(directory) if hasattr(module, "remarks") else [],
    }
    with file_of(peer, scenario).open("a") as results:
        results.write(json.dumps(about) + "\n")
    print(report.line(about), flush=True)
    if keep:
        print(f"  its files: {directory}")
    else:
        shutil.rmtree(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=PEERS, help="this peer (and others named so)")
    parser.add_argument("--scenario", action="append", choices=SCENARIOS, help="this scenario (and others named so)")
    parser.add_argument("--again", action="store_true", help="also where a result is kept: once more")
    parser.add_argument("--keep", action="store_true", help="leave what the processes wrote and said where it is")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    if not options.report:
        if reason := why_not():
            sys.exit(f"error: {reason}")
        for scenario in options.scenario or SCENARIOS:
            for peer in options.only or PEERS:
                is_wanted = options.again or not file_of(peer, scenario).exists()
                if is_wanted and ONLY_IN.get(peer, scenario) == scenario:
                    run(peer, scenario, keep=options.keep)
    report.write(RESULTS, PEERS, {name: scenario.kills for name, scenario in SCENARIOS.items()})


if __name__ == "__main__":
    main()
