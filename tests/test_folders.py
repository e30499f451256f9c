"""Folders as transformers keeps models: what goes in, what stays out, and what is said of those that cannot be made."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hetero_async import exporting, looking
from hetero_async.config import RunConfig
from hetero_async.errors import UserError
from hetero_async.folders import check_pattern, read_weights, write_folder
from hetero_async.tables import template


def tensors(**values: float) -> dict[str, torch.Tensor]:
    return {name.replace("__", "."): torch.full((4, 4), value) for name, value in values.items()}


@pytest.fixture
def like(tmp_path: Path) -> Path:
    """What a model was begun from: config, tokenizer, weights of which one is tied and one frozen, and other things."""
    folder = tmp_path / "like"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "dtype": "bfloat16", "name": "β"}))
    (folder / "tokenizer.json").write_text("{}")
    save_file(tensors(embed=-1.0, head=-1.0, frozen=7.0), folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"")
    (folder / ".cache").mkdir()
    (folder / ".gitattributes").write_text("")
    return folder


def test_what_was_frozen_comes_from_the_folder_it_is_made_like_and_of_tied_ones_one_is_written(
    tmp_path: Path, like: Path
) -> None:
    out = tmp_path / "out"
    write_folder(out, tensors(embed=1.0, head=1.0), {"head"}, like, "5GB")
    assert {path.name for path in out.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
    found = load_file(out / "model.safetensors")
    assert {name: value[0, 0].item() for name, value in found.items()} == {"embed": 1.0, "frozen": 7.0}
    assert json.loads((out / "config.json").read_text()) == {"model_type": "gpt2", "dtype": "float32", "name": "β"}
    assert not list(tmp_path.glob("*.new"))


def test_it_is_sharded_by_size_and_read_back_whole(tmp_path: Path, like: Path) -> None:
    (like / "model.safetensors").unlink()
    values = {f"layer{number}": torch.full((16, 16), float(number)) for number in range(5)}
    write_folder(tmp_path / "out", values, set(), like, "3KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == values.keys() and len(set(index["weight_map"].values())) == 3
    assert index["metadata"]["total_size"] == 5 * 1024
    found = read_weights(tmp_path / "out")
    assert found.keys() == values.keys() and all(torch.equal(found[name], values[name]) for name in values)


def test_weights_of_another_model_are_not_mixed_in(tmp_path: Path, like: Path) -> None:
    with pytest.raises(UserError, match=r"of another model, which has no model\.embed; .* take it off with --prefix"):
        write_folder(tmp_path / "out", tensors(model__embed=1.0), set(), like, "5GB")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, like: Path) -> None:
    (like / "config.json").write_text("{")
    with pytest.raises(UserError, match="out: cannot be written"):
        write_folder(tmp_path / "out", tensors(embed=1.0), set(), like, "5GB")
    with pytest.raises(UserError, match="out: cannot be written"):
        write_folder(tmp_path / "out", tensors(embed=1.0), set(), like, "much")
    assert {path.name for path in tmp_path.iterdir()} == {"like"}


def test_without_the_extra_it_is_named(tmp_path: Path, like: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"this needs huggingface_hub: pip install 'hetero-async\[huggingface\]'"):
        write_folder(tmp_path / "out", tensors(embed=1.0), set(), like, "5GB")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda like: (like / "config.json").unlink(), "holds no config.json: transformers could not tell which model"),
        (
            lambda like: like.rename(like.with_name("away")),
            r"like: is not a folder; --like takes one with config\.json",
        ),
    ],
)
def test_a_folder_that_says_no_model_is_told(like: Path, change: Callable[[Path], object], complaint: str) -> None:
    change(like)
    with pytest.raises(UserError, match=complaint):
        check_pattern(like)


# --- the verb ---


@pytest.fixture
def run_toml(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(template(run={"name": "tiny", "samples": 10}, sites={"here": 1}))
    return path


def test_options_that_do_not_go_together_are_told(tmp_path: Path, run_toml: Path, like: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="--format huggingface needs --like FOLDER"):
        exporting.export(out, run_toml, exporting.Format.HUGGINGFACE)
    for given in ({"like": like}, {"prefix": "model."}):
        with pytest.raises(UserError, match="--like and --prefix go with --format huggingface"):
            exporting.export(out, run_toml, **given)


def test_a_folder_that_is_there_is_not_written_over(run_toml: Path, like: Path) -> None:
    with pytest.raises(UserError, match="like: is there already, and nothing is written over; name a folder to make"):
        looking.export_folder(RunConfig.load(run_toml), like, like, "", "5GB")
