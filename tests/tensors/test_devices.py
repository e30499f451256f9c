"""Devices and dtypes have names that people know."""

import pytest
import torch

from hetero_async.tensors.devices import describe, dtype_name


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
