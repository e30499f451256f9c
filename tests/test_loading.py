"""What a run exported comes back into a model."""

import json
from pathlib import Path
from typing import Any

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
    frozen = model.frozen.weight.clone()
    ha.load(tmp_path / "model.safetensors", model)
    for name, value in expected.items():
        assert torch.equal(model.state_dict()[name], value.to(model.state_dict()[name].dtype)), name
    assert torch.equal(model.frozen.weight, frozen), "what did not travel stays"
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"temperature": None}, "is not of this model: it lacks temperature"),
        ({"frozen.bias": None}, "is not of this model: it lacks frozen.bias"),
        ({"norm.running_var": None}, "is not of this model: it lacks norm.running_var"),
        (
            {"head.weight": None, "embedding.weight": None},
            "is not of this model: it lacks embedding.weight, head.weight$",
        ),
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


# --- what others have saved ---


class Pair(torch.nn.Module):
    """A trained adapter on a frozen base, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.base = torch.nn.Linear(3, 3).requires_grad_(False)
        self.adapter = torch.nn.Linear(3, 3)
        self.register_buffer("scale", torch.tensor(2.0))


def test_a_file_of_exactly_the_trained_parameters_is_enough(tmp_path: Path) -> None:
    source, model = Pair(), Pair()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(dict(source.adapter.named_parameters(prefix="adapter")), tmp_path / "adapters.safetensors")
    ha.load(tmp_path / "adapters.safetensors", model)
    assert torch.equal(model.adapter.weight, source.adapter.weight)
    assert all(torch.equal(model.state_dict()[name], kept[name]) for name in ("base.weight", "base.bias", "scale"))


def folder(path: Path, model: torch.nn.Module, **index: str) -> Path:
    """Each tensor in a file of its own, as the largest models are; `index`: what it says of a tensor instead."""
    path.mkdir()
    names = {name: f"model-{number}.safetensors" for number, name in enumerate(model.state_dict())}
    for name, value in model.state_dict().items():
        save_file({name: value}, path / names[name])
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names | index}))
    return path


def test_a_folder_of_shards_is_loaded(tmp_path: Path) -> None:
    source, model = Pair(), Pair()
    ha.load(folder(tmp_path / "sharded", source), model)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


def test_of_tied_parameters_a_file_may_hold_one(tmp_path: Path) -> None:
    source, model = Awkward(), Awkward()
    tensors = {name: value for name, value in source.state_dict().items() if name != "head.weight"}
    save_file(tensors, tmp_path / "model.safetensors")
    ha.load(tmp_path, model)  # a folder with one file
    assert torch.equal(model.head.weight, source.head.weight)


@pytest.mark.parametrize(
    ("index", "complaint"),
    [
        ({"scale": "../other/model-0.safetensors"}, "which is no file of its folder"),
        ({"scale": "model-99.safetensors"}, r"model-99\.safetensors: cannot be read"),
        (None, "is not an index of shards"),
        ("", "holds neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_a_folder_that_cannot_be_read_is_told(tmp_path: Path, index: Any, complaint: str) -> None:
    path = folder(tmp_path / "sharded", Pair(), **(index or {}))
    if index is None:
        (path / "model.safetensors.index.json").write_text("[]")
    elif not index:
        (path / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=complaint):
        ha.load(path, Pair())
