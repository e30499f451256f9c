"""Which errors are the machine's refusal of memory, and how a server takes its vectors."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hetero_async.shell.memory import told_of_memory


def test_a_refusal_of_memory_is_told_in_a_line_that_says_what_helps() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    for error in (refused.value, MemoryError(), RuntimeError("can't start new thread")):
        told = told_of_memory(error)
        assert told.startswith("the machine gives no more memory (") and "ulimit -v" in told


@pytest.mark.parametrize("error", [RuntimeError("boom"), ValueError("no"), RuntimeError()])
def test_other_errors_are_none(error: Exception) -> None:
    assert told_of_memory(error) == ""


SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
COPIED = """
import resource, torch
from hetero_async.shell.memory import set_manners
set_manners()
vector = torch.zeros(16 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
kept = vector.clone()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not SETTING.exists() or "[never]" in SETTING.read_text(), reason="this kernel has no huge pages")
def test_a_servers_vectors_lie_in_huge_pages() -> None:
    faults = int(subprocess.check_output([sys.executable, "-c", COPIED]))
    assert faults < (64 << 20) // 4096 / 4
