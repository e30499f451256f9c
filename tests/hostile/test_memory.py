"""How much memory a server takes while 200 peers attack it, in a memory cgroup where the machine has one.

The bound is 12 bytes per parameter (parameters, momentum, shadow) and 600 MB for all else.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest
import torch
import xxhash
import zmq
from e2e.harness import PATIENCE_SECONDS, Run
from hostile import wide
from hostile.attacks import FROM_OUTSIDE, FROM_WITHIN, Target, secure
from hostile.members import Member, hold_places

from hetero_async.formats.chunks import CHUNK_BYTES
from hetero_async.shell.keys import load_public, load_secret
from hetero_async.shell.telemetry import SUMMED
from hetero_async.tensors.codecs import encode_payload
from hetero_async.tensors.schema import schema_of

CGROUPS = Path("/sys/fs/cgroup/memory")
BOUND_BYTES = 12 * wide.NUMEL + 600_000_000
# Members that hold uploads open, that push what is refused, and that do all the rest; others come from outside.
HOLDERS, SPOILERS, OTHERS = 50, 30, 10
ATTACK_SECONDS = 15.0
LOOK_SECONDS = 0.2


@contextmanager
def limited(limit_bytes: int) -> Iterator[Path | None]:
    """A memory cgroup (version 1), or None where there is none to be had."""
    group = CGROUPS / f"hetero-async-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
    except OSError:
        yield None
        return
    try:
        yield group
    finally:
        deadline = time.monotonic() + 10
        while (group / "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        group.rmdir()


def serve(run: Run, group: Path | None, output: Path) -> "subprocess.Popen[bytes]":
    enter = f"echo $$ > {group / 'cgroup.procs'} && " if group else ""
    command = f"{enter}exec {sys.executable} -m hetero_async serve --run {run.config.path}"
    with output.open("ab") as file:
        return subprocess.Popen(["sh", "-c", command], stdout=file, stderr=file)


def peak_bytes(pid: int) -> int:
    """The most that has been resident at once."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def anonymous_bytes(pid: int) -> int:
    """Resident now, and nobody can take it back without a kill; pages of files the kernel would."""
    status = Path(f"/proc/{pid}/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def target_of(run: Run, name: str = "") -> Target:
    control, bulk = (int(at.rsplit(":", 1)[1]) for at in (run.config.server.address, run.config.node("server").bulk))
    keys = run.config.keys
    pair = (load_public(keys / f"{name}.public"), load_secret(keys / f"{name}.secret")) if name else (b"", b"")
    return Target(control, bulk, load_public(keys / "server.public"), *pair)


def members(run: Run, names: list[str], value: float, is_whole: bool) -> list[Member]:
    generator = torch.Generator().manual_seed(0)
    payload = encode_payload("fp32", torch.randn(wide.NUMEL, generator=generator) * value)
    schema, payload_hash = schema_of(wide.model()).to_bytes(), xxhash.xxh3_128_digest(payload)
    return [Member(target_of(run, name), schema, payload, payload_hash, is_whole) for name in names]


@pytest.mark.timeout(600)
def test_under_the_attack_of_200_peers_the_server_stays_within_its_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        Run(tmp_path, workers=1 + HOLDERS + SPOILERS + OTHERS, samples=wide.SAMPLES, lease_ttl_seconds=15.0) as run,
        limited(BOUND_BYTES) as group,
    ):
        output, stop = tmp_path / "server.output", Event()
        server = serve(run, group, output)
        try:
            run.start_worker("here-0", wide.train)
            run.wait(lambda: len(run.deltas("here-0")) > 1, "the run has begun")
            quiet = peak_bytes(server.pid)
            names = run.names[1:]
            with ThreadPoolExecutor(40) as threads:
                holders = members(run, names[:HOLDERS], 1.0, is_whole=False)
                spoilers = members(run, names[HOLDERS : HOLDERS + SPOILERS], 1e30, is_whole=True)
                jobs = [threads.submit(hold_places, some, stop) for some in (holders, spoilers)]
                jobs += [threads.submit(attack, target_of(run), stop) for attack in FROM_OUTSIDE.values()]
                for number, name in enumerate(names[HOLDERS + SPOILERS :]):
                    attack = list(FROM_WITHIN.values())[number % len(FROM_WITHIN)]
                    jobs.append(threads.submit(attack, target_of(run, name), stop))
                began = time.monotonic()
                known, ends = len(run.deltas("here-0")), began + ATTACK_SECONDS
                anonymous, passed = 0, 0
                while server.poll() is None and time.monotonic() < ends + (0 if passed else PATIENCE_SECONDS):
                    time.sleep(LOOK_SECONDS)
                    anonymous = max(anonymous, anonymous_bytes(server.pid))
                    if not passed:
                        passed = len(run.deltas("here-0")) - known
                stop.set()
                for job in jobs:
                    job.result(60)
            assert server.poll() is None, f"the server has ended\n{output.read_text()[-3000:]}"
            peak = peak_bytes(server.pid)
            assert passed, "the honest worker's deltas go on meanwhile"
            with capsys.disabled():
                charged = int((group / "memory.max_usage_in_bytes").read_text()) if group else 0
                print(f"\nserver: at most {quiet / 1e6:.0f} MB resident when quiet, {peak / 1e6:.0f} MB under attack, ")
                bound = f"of those {anonymous / 1e6:.0f} MB are no file's; bound {BOUND_BYTES / 1e6:.0f} MB"
                print(f"{charged / 1e6:.0f} MB charged to its cgroup, file cache included; {bound}")
            # What is resident counts the pages of shared libraries as well; the cgroup would have ended it by now.
            assert group or peak < BOUND_BYTES
            lines, minutes = output.read_text().splitlines(), (time.monotonic() - began) / 60
            print(*lines, sep="\n")
            for summed in {*SUMMED.values()}:
                kinds = {summed, *(kind for kind, line in SUMMED.items() if line == summed)}
                told = [line for line in lines if any(f" {kind} " in line for kind in kinds)]
                assert len(told) <= 1 + minutes, "the first at once, and then one line a minute"
            assert any(" refused key " in line or " strangers " in line for line in lines)
            assert any(" refused message " in line for line in lines)
        finally:
            stop.set()
            server.terminate()
            server.wait(30)


@pytest.mark.timeout(600)
def test_55_a_member_that_never_ends_its_message_is_stopped_by_the_cgroup_and_costs_a_restart(tmp_path: Path) -> None:
    """libzmq gathers all parts of a message before anybody sees one, and sets no limit: that takes the kernel."""
    with Run(tmp_path, workers=2, samples=wide.SAMPLES) as run, limited(BOUND_BYTES) as group:
        if group is None:
            pytest.skip("no memory cgroup to be had on this machine")
        output = tmp_path / "server.output"
        server = serve(run, group, output)
        try:
            run.start_worker("here-0", wide.train)
            run.wait(lambda: len(run.deltas("here-0")) > 1, "the run has begun")
            endless(target_of(run, "here-1"), server)
            assert server.wait(60) == -9, "killed by the kernel, and nothing else on this machine"
            known = len(run.deltas("here-0"))
            assert known
            server = serve(run, group, output)
            run.wait(lambda: len(run.deltas("here-0")) > known, "the honest worker's deltas go on")
        finally:
            server.terminate()
            server.wait(30)


def endless(target: Target, server: "subprocess.Popen[bytes]") -> None:
    """A message of so many parts of 1 MiB (the same one, so that it costs us nothing) that no server can hold it."""
    deadline = time.monotonic() + 120
    part = bytes(CHUNK_BYTES)
    with zmq.Context() as context, context.socket(zmq.DEALER) as raw:
        raw.setsockopt(zmq.LINGER, 0)
        secure(raw, target, "member")
        raw.connect(f"tcp://127.0.0.1:{target.bulk}")
        raw.send_multipart([part] * (2 * BOUND_BYTES // CHUNK_BYTES), copy=False)
        while server.poll() is None:
            assert time.monotonic() < deadline, "the server lives on"
            time.sleep(LOOK_SECONDS)
