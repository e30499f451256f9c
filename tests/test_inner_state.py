"""When a worker keeps its optimizer's state, and what it does with it in its next life."""

from pathlib import Path

import pytest
import torch

from hetero_async import inner_state
from hetero_async.errors import DiskFull
from hetero_async.inner_state import KEEP_SECONDS, InnerState
from hetero_async.shell.kept import KeptFile


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def stepped() -> torch.optim.Optimizer:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.grad = torch.ones(3)
    optimizer.step()
    return optimizer


def empty() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1, momentum=0.9)


def test_what_one_life_wrote_the_next_goes_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "w-0" / "optimizer.kept"
    assert not InnerState(empty(), path, "w-0").restore()
    assert capsys.readouterr().err == "", "a first life has nothing to say about it"
    first = InnerState(stepped(), path, "w-0")
    first.write(first.copy())
    optimizer = empty()
    assert InnerState(optimizer, path, "w-0").restore()
    assert capsys.readouterr().err == f"w-0: the optimizer goes on with {path}\n"
    (state,) = optimizer.state.values()
    assert torch.equal(state["momentum_buffer"], torch.ones(3))


def test_it_is_copied_at_the_end_of_a_round_and_not_more_often_than_once_a_minute(tmp_path: Path) -> None:
    clock = Clock()
    kept = InnerState(stepped(), tmp_path / "k", "w-0", clock)
    assert not kept.copy_if_due(1), "too early"
    clock.seconds = KEEP_SECONDS + 1
    assert not kept.copy_if_due(0), "no round has ended"
    assert kept.copy_if_due(1)
    clock.seconds += KEEP_SECONDS / 2
    assert not kept.copy_if_due(2)
    clock.seconds += KEEP_SECONDS / 2
    assert kept.copy_if_due(2)


@pytest.mark.parametrize("damage", [b"", b"short", b"x" * 200])
def test_a_damaged_file_is_set_aside_and_the_optimizer_begins_anew(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "optimizer.kept"
    path.write_bytes(damage)
    optimizer = empty()
    assert not InnerState(optimizer, path, "w-0").restore()
    assert not optimizer.state
    assert path.with_suffix(".damaged").read_bytes() == damage
    assert not path.exists()


def test_another_optimizers_state_is_told_and_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "optimizer.kept"
    kept = InnerState(stepped(), path, "w-0")
    kept.write(kept.copy())
    other = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    assert not InnerState(other, path, "w-0").restore()
    complaint = f"w-0: the optimizer begins anew: {path}: it is of SGD, and the optimizer is AdamW\n"
    assert capsys.readouterr().err == complaint


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    kept = KeptFile(tmp_path / "file")
    kept.save(b"content" * 20)
    assert kept.load() == b"content" * 20
    written = bytearray(kept.path.read_bytes())
    written[-5] ^= 1
    kept.path.write_bytes(written)
    assert kept.load() is None


def test_a_full_disk_is_told_when_the_worker_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise DiskFull("no space left to write it")

    monkeypatch.setattr(inner_state.KeptFile, "save", full)
    InnerState(stepped(), tmp_path / "k", "w-0").write_last()
    assert capsys.readouterr().err == "w-0: the optimizer's state is not kept: no space left to write it\n"
