"""What a run exported comes back into a model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tensors.models import Awkward, Run

import hetero_async as ha
from hetero_async.errors import UserError


def exported(path: Path) -> dict[str, torch.Tensor]:
    run = Run(Awkward())
    run.server.export(path)
    return run.server.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exported_model_is_loaded_under_its_own_names(tmp_path: Path, dtype: torch.dtype) -> None:
    expected = exported(tmp_path / "model.safetensors")
    model = Awkward().to(dtype)
    ha.load(tmp_path / "model.safetensors", model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name].to(value.dtype)), name
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"head.weight": None}, "is not of this model: it lacks head.weight"),
        ({"tail": torch.zeros(1)}, "is not of this model: it has also tail"),
        ({"temperature": torch.zeros(2)}, r"is not of this model: temperature is \(2,\), in the model \(\)"),
    ],
)
def test_another_models_file_is_refused_and_changes_nothing(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], complaint: str
) -> None:
    path, model = tmp_path / "model.safetensors", Awkward()
    tensors = {name: value.clone() for name, value in model.state_dict().items()} | changes
    save_file({name: value + 1 for name, value in tensors.items() if value is not None}, path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=complaint):
        ha.load(path, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("content", [None, b"not a model"])
def test_a_file_that_cannot_be_read_is_told(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read: "):
        ha.load(path, Awkward())
