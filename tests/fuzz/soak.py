"""Coverage-guided fuzzing of every decoder, each for so many minutes: `make soak` runs it, or

    python tests/fuzz/soak.py --minutes 10 [--at-once 2] [--only header ...]

Each decoder runs in a process of its own. An input that breaks one is kept in `found/NAME/`, where test_decoders.py
tries it for ever after. The exit code is that of the worst.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
FOUND = HERE / "found"
MEMORY_MB_MAX = 2048
SECONDS_EACH_MAX = 10
INPUT_BYTES_MAX = 4096


def fuzz(name: str, seconds: int, seeds: Path) -> int:
    """One decoder, in this process; does not return before the time is over or something is found."""
    import atheris

    with atheris.instrument_imports(include=["hetero_async", "msgpack"]):
        sys.path.insert(0, str(HERE.parent))
        from fuzz.decoders import DECODERS
    decoder, good = DECODERS[name]
    for number, data in enumerate(good):
        (seeds / f"good-{number}").write_bytes(data)
    (FOUND / name).mkdir(parents=True, exist_ok=True)
    options = {
        "max_total_time": seconds, "timeout": SECONDS_EACH_MAX, "rss_limit_mb": MEMORY_MB_MAX,
        "max_len": INPUT_BYTES_MAX, "artifact_prefix": f"{FOUND / name}/", "print_final_stats": 1, "verbosity": 1,
    }  # fmt: skip
    atheris.Setup([sys.argv[0], *(f"-{key}={value}" for key, value in options.items()), str(seeds)], decoder)
    atheris.Fuzz()
    return 0


def supervise(name: str, minutes: float) -> int:
    """Fuzz one decoder in a process of its own, and say what came of it. Returns that process's exit code."""
    command = [sys.executable, __file__, "--minutes", str(minutes), "--alone", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = dict(re.findall(r"stat::(\w+):\s+(\d+)", done.stderr))
    inputs, memory = int(told.get("number_of_executed_units", 0)), told.get("peak_rss_mb", "?")
    verdict = "nothing found" if done.returncode == 0 else f"FOUND something (exit code {done.returncode})"
    print(f"{name:<20} {inputs:12,} inputs, {memory} MB at most: {verdict}", flush=True)
    if done.returncode:
        print("\n".join(done.stderr.splitlines()[-30:]))
    return abs(done.returncode)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="for each decoder")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1, help="so many decoders")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--alone", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        import tempfile

        with tempfile.TemporaryDirectory() as seeds:
            return fuzz(options.alone, round(60 * options.minutes), Path(seeds))
    sys.path.insert(0, str(HERE.parent))
    from fuzz.decoders import DECODERS

    with ThreadPoolExecutor(options.at_once) as pool:
        return max(pool.map(supervise, options.only or DECODERS, itertools.repeat(options.minutes)))


if __name__ == "__main__":
    sys.exit(main())
