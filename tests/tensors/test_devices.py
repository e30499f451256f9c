"""Devices have names that people know, are asked what they can do, and are copied from and to beside other work.

No machine that runs these tests has an accelerator: a stand-in answers in the place of a plug-in such as torch_npu, in
the calls that are made of it and in their order. What it shows has not been seen on hardware.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from hetero_async.tensors import devices
from hetero_async.tensors.devices import (
    Memory,
    beside,
    computes_in,
    describe,
    dtype_name,
    found,
    memory,
    staged,
    to_host,
)

STAND_IN = torch.device("privateuseone", 0)  # what torch calls a plug-in's device that has given itself no name
CPU = torch.device("cpu")


def test_a_device_without_a_better_name_is_called_by_its_type() -> None:
    assert describe(torch.device("cpu")) == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_called_by_its_model() -> None:
    assert describe(torch.device("cuda", 0)) == torch.cuda.get_device_name(0)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float8_e5m2, "float8_e5m2")],
)
def test_dtypes_have_short_names(dtype: torch.dtype, name: str) -> None:
    assert dtype_name(dtype) == name


class Calls(list[str]):
    """What was asked of the stand-in, in order."""

    def stream(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: self.append(f"{name} waits for {other.name}"),
            synchronize=lambda: self.append(f"{name} is done"),
        )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """The stand-in, as the plug-in registers itself: a module of torch's, and torch.accelerator's answers."""
    said = Calls()
    usual, own = said.stream("usual"), said.stream("own")
    plug_in = SimpleNamespace(get_device_name=lambda device: "Ascend910B", mem_get_info=lambda device: (3, 4))
    monkeypatch.setattr(torch, STAND_IN.type, plug_in, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(STAND_IN.type))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: usual)
    monkeypatch.setattr(torch.accelerator, "set_stream", lambda stream: said.append(f"on {stream.name}"))
    monkeypatch.setattr(torch, "Stream", lambda device: own)
    devices._stream.cache_clear()
    yield said
    devices._stream.cache_clear()


def test_without_an_accelerator_there_is_the_cpu() -> None:
    if not torch.accelerator.is_available():
        assert found() == [CPU]
        assert memory(CPU) is None


def test_a_plug_in_is_found_named_and_asked_for_its_memory(calls: Calls) -> None:
    assert found() == [STAND_IN, torch.device(STAND_IN.type, 1)]
    assert describe(STAND_IN) == "Ascend910B"
    assert memory(STAND_IN) == Memory(free_bytes=3, total_bytes=4)


def test_memory_that_is_shared_with_the_host_is_what_the_plug_in_recommends(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in = SimpleNamespace(recommended_max_memory=lambda: 10, driver_allocated_memory=lambda: 4)
    monkeypatch.setattr(torch, STAND_IN.type, plug_in, raising=False)
    assert memory(STAND_IN) == Memory(free_bytes=6, total_bytes=10)
    monkeypatch.setattr(torch, STAND_IN.type, SimpleNamespace(), raising=False)
    assert memory(STAND_IN) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_device_is_tried_in_a_dtype_and_not_taken_by_its_name(dtype: torch.dtype) -> None:
    assert computes_in(CPU, dtype)
    assert not computes_in(CPU, torch.int8)  # it has no gradient
    assert not computes_in(torch.device("meta"), dtype)  # which has no values


def test_work_beside_begins_after_what_was_given_before_and_is_done_when_left(calls: Calls) -> None:
    with beside(STAND_IN):
        pass  # which tries once whether the plug-in can do it
    calls.clear()
    with beside(STAND_IN):
        calls.append("work")
    assert calls == ["own waits for usual", "on own", "work", "on usual", "own is done"]


def test_a_plug_in_without_streams_does_the_work_as_any_other(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> None:
        raise NotImplementedError

    monkeypatch.setattr(torch, "Stream", refuse)
    with beside(STAND_IN):
        calls.append("work")
    assert calls == ["work"]


def test_what_lies_on_the_cpu_stays_there() -> None:
    vector = torch.ones(3)
    assert to_host(vector) is vector
    assert staged(vector, CPU) is vector
    assert torch.equal(staged(vector, STAND_IN), vector)  # also where no memory can be locked


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_copies_from_and_to_an_accelerator_are_exact() -> None:
    device = found()[0]
    vector = torch.arange(100_000, dtype=torch.float32)
    there = staged(vector, device).to(device, non_blocking=True)
    with beside(device):
        assert torch.equal(to_host(there * 2), vector * 2)
