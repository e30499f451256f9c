"""Memory: a server gives back what it does not use, takes it in large pages, and says so when it is given no more.

The C allocator's manners are set once, by whoever starts a server. By default glibc learns from vectors that come and
go to keep them, in a heap for each thread: with 5 million parameters a server that needs 0.3 GB grew to 1.3 GB in half
a minute.
"""

import ctypes
import os

# From malloc.h.
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
# What is larger comes from the kernel, and goes back to it when it is freed.
LARGE_BYTES = 1024 * 1024
ARENAS_MAX = 2
# torch asks the kernel for huge pages then. A new vector of 40 MB is 10,000 faults otherwise, which take longer than
# to fill it.
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
# How CPython and torch say it where it is no MemoryError: a thread wants memory for its stack.
REFUSALS = ("can't start new thread", "can't allocate memory", "not enough memory", "Cannot allocate memory")


def set_manners() -> None:
    """Before the first vector. Does nothing where the C library is another one and the kernel has no huge pages."""
    os.environ.setdefault(HUGE_PAGES, "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(M_ARENA_MAX, ARENAS_MAX)


def told_of_memory(error: BaseException) -> str:
    """The line for people, where this was the machine's refusal of memory; "" where it was something else."""
    if not (isinstance(error, MemoryError) or any(refusal in str(error) for refusal in REFUSALS)):
        return ""
    reason = str(error)[:200] or type(error).__name__
    return (
        f"the machine gives no more memory ({reason}): stopping; what was acknowledged is on the disk. "
        "Raise the limit (ulimit -v, the cgroup's memory) or free some, and start again"
    )
