"""Which errors are the machine's refusal of memory."""

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
