"""What accelerator a tensor lies on, in words for people."""

import torch

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


def describe(device: torch.device) -> str:
    """A name such as "NVIDIA H20", or the device's type where its plug-in gives none."""
    backend = getattr(torch, device.type, None)
    get_name = getattr(backend, "get_device_name", None)
    return str(get_name(device)) if get_name is not None else str(device.type)


def dtype_name(dtype: torch.dtype) -> str:
    return DTYPES.get(dtype, str(dtype).removeprefix("torch."))
