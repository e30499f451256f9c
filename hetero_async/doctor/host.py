"""This host by itself: versions, limits, memory, clock, arithmetic, devices."""

import importlib.metadata
import platform
import resource
from collections.abc import Iterator
from pathlib import Path

from hetero_async.doctor.findings import Finding, failed, ok, warning

PACKAGES = ("hetero-async", "torch", "pyzmq", "numpy", "zstandard", "trio")
# Two sockets a worker with what libzmq needs for each, log, checkpoints, and some more.
FILES_MIN, FILES_OF_WORKER = 256, 4
MEMINFO = Path("/proc/meminfo")
CLOCK = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
# These count timer interrupts, of which a busy or paused machine loses some.
UNSTEADY_CLOCKS = ("jiffies", "refined-jiffies", "pit")


def versions() -> Iterator[Finding]:
    names = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    told = f"{', '.join(names)}; Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    if platform.system() != "Linux":
        yield warning("versions", f"{told}; servers are tested on Linux only: run server and standbys there")
    else:
        yield ok("versions", told)


def files(workers: int) -> Iterator[Finding]:
    """`workers`: that this host speaks with, or has."""
    needed = FILES_MIN + FILES_OF_WORKER * workers
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or limit >= needed:
        yield ok("open files", f"limit {limit}, needed {needed}")
    else:
        yield failed(
            "open files", f"limit {limit}, needed {needed}: ulimit -n {needed}, or LimitNOFILE= (most: {most})"
        )


def available_memory() -> int:
    """Bytes; 0 where the system does not tell."""
    if not MEMINFO.exists():
        return 0
    lines = (line.split() for line in MEMINFO.read_text().splitlines())
    return next((1024 * int(words[1]) for words in lines if words[0] == "MemAvailable:"), 0)


def memory(needed_bytes: float, what: str) -> Iterator[Finding]:
    """`needed_bytes` 0: nobody knows."""
    available = available_memory()
    told = f"{available / 1e9:.1f} GB available"
    if not available:
        yield warning("memory", "this system does not tell how much is free; look yourself")
    elif not needed_bytes:
        yield ok("memory", f"{told}; how much {what} needs: hetero-async plan")
    elif available < needed_bytes:
        yield failed(
            "memory", f"{told}, {what} needs {needed_bytes / 1e9:.1f} GB: a larger machine, or a smaller model"
        )
    else:
        yield ok("memory", f"{told}, {what} needs {needed_bytes / 1e9:.1f} GB")


def clock() -> Iterator[Finding]:
    """Nothing here needs clocks in step, and no peer tells its time; leases need one that runs evenly."""
    source = CLOCK.read_text().strip() if CLOCK.exists() else ""
    if source in UNSTEADY_CLOCKS:
        yield warning(
            "clock", f"{source} loses time under load, and leases count on it: choose tsc or the hypervisor's"
        )
    else:
        told = f"source {source}" if source else "its source is not told here"
        yield ok("clock", f"{told}; clocks of hosts need not agree, so they are not compared")


def arithmetic() -> Iterator[Finding]:
    from hetero_async.tensors import selfcheck

    found = selfcheck.arithmetic()
    if found == selfcheck.DIGEST:
        yield ok("arithmetic", f"digest {found[:8]}, as everywhere")
    else:
        yield failed(
            "arithmetic",
            f"digest {found[:8]}, everywhere else {selfcheck.DIGEST[:8]}: this CPU or this torch rounds otherwise "
            "(fuses a product and a sum?), so no log would be the same here; do not serve or stand by on this host, or "
            "install the torch that the other hosts have",
        )


def devices() -> Iterator[Finding]:
    from hetero_async.tensors import devices, selfcheck

    for device in devices.found():
        memory = devices.memory(device)
        room = f", {memory.free_bytes / 1e9:.1f} of {memory.total_bytes / 1e9:.1f} GB free" if memory else ""
        dtypes = devices.dtypes_of(device)
        told = f"{devices.describe(device)}{room}; computes in {', '.join(dtypes) or 'nothing'}"
        subject = f"device {device}"
        if "fp32" not in dtypes:
            yield failed(subject, f"{told}: a delta is measured in fp32; is the driver that of this torch?")
        elif different := selfcheck.differing_codecs(device):
            yield warning(
                subject,
                f"{told}; {', '.join(different)} coded otherwise than on a CPU: nothing is inexact by that, since what "
                "was sent is what counts, but choose another codec_up if you compare runs",
            )
        else:
            yield ok(subject, f"{told}; all codecs code as on a CPU, to the bit")
