"""What accelerator there is and what it can do, and copies from it and to it that hold up nobody.

All devices are reached through torch.accelerator and through the module that each plug-in registers with torch
(torch.cuda, also for ROCm; torch.npu of torch_npu for Ascend; torch.xpu; torch.mps). Nothing is concluded from a
device's name: what it can do is tried on it.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
# What a device that cannot do something answers: it knows no such kernel, dtype, call or memory.
REFUSALS = (RuntimeError, NotImplementedError, TypeError, AttributeError, AssertionError)


@dataclass(frozen=True, slots=True)
class Memory:
    free_bytes: int
    total_bytes: int


def found() -> list[torch.device]:
    """This process's accelerators; the CPU where there is none."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is None:
        return [torch.device("cpu")]
    return [torch.device(kind.type, index) for index in range(torch.accelerator.device_count())]


def describe(device: torch.device) -> str:
    """A name such as "NVIDIA H20", or the device's type where its plug-in gives none."""
    get_name = getattr(_plug_in(device), "get_device_name", None)
    return str(get_name(device)) if get_name is not None else str(device.type)


def dtype_name(dtype: torch.dtype) -> str:
    return DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def memory(device: torch.device) -> Memory | None:
    """None where the plug-in does not tell, and for the CPU, which shares the host's."""
    plug_in = _plug_in(device)
    try:
        if hasattr(plug_in, "mem_get_info"):
            free, total = plug_in.mem_get_info(device)
        else:  # torch.mps has the host's memory, of which it recommends a share
            total = plug_in.recommended_max_memory()
            free = total - plug_in.driver_allocated_memory()
    except REFUSALS:
        return None
    return Memory(int(free), int(total))


def computes_in(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product and its gradient come out right in this dtype, on this very device."""
    try:
        ones = torch.ones(8, 8, device=device, dtype=dtype, requires_grad=True)
        product = ones @ ones
        product.sum().backward()
        gradient = ones.grad
        return bool((product == 8).all()) and gradient is not None and bool((gradient == 16).all())
    except REFUSALS:
        return False


def dtypes_of(device: torch.device) -> list[str]:
    """Of those that models are trained in, the ones that it computes in."""
    return [DTYPES[dtype] for dtype in (torch.float32, torch.bfloat16, torch.float16) if computes_in(device, dtype)]


def _plug_in(device: torch.device) -> Any:
    """The module that the device's maker has registered with torch."""
    return getattr(torch, device.type, None)


# --- copies ---


@contextlib.contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """In here this thread's work on the device runs on a stream of its own, after all that was given to it before.

    The training loop's work, of another thread, does not queue behind it, nor does it wait for what comes later. On
    return it is done. Where a device has no streams it runs as any other work.
    """
    stream = _stream(device)
    if stream is None:
        yield
        return
    usual = torch.accelerator.current_stream(device)
    stream.wait_stream(usual)
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        torch.accelerator.set_stream(usual)
        stream.synchronize()  # what was lent to it may be freed now


@functools.cache
def _stream(device: torch.device) -> torch.Stream | None:
    """One for each device, since the allocator keeps memory apart for every stream that it has seen.

    None where the device, or its plug-in, cannot do all that `beside` does.
    """
    if device.type == "cpu":
        return None
    try:
        usual = torch.accelerator.current_stream(device)
        stream = torch.Stream(device=device)
        stream.wait_stream(usual)
        torch.accelerator.set_stream(stream)
        torch.accelerator.set_stream(usual)
        stream.synchronize()
    except REFUSALS:
        return None
    return stream


def to_host(vector: torch.Tensor) -> torch.Tensor:
    """On the CPU, once the work of the present stream is done. Through page-locked memory where there is any."""
    if vector.device.type == "cpu":
        return vector
    staged = _page_locked(vector.shape, vector.dtype)
    if staged is None:
        return vector.cpu()
    staged.copy_(vector, non_blocking=True)
    torch.accelerator.current_stream(vector.device).synchronize()
    return staged


def staged(vector: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU vector in such memory that copying it to the device need not be waited for."""
    if device.type == "cpu" or vector.is_pinned():
        return vector
    locked = _page_locked(vector.shape, vector.dtype)
    return vector if locked is None else locked.copy_(vector)


def _page_locked(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor | None:
    """None where the device knows no such memory, or the host grants no more of it."""
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except REFUSALS:
        return None
