"""Weights as Hugging Face's libraries keep them: a safetensors file, or a folder of shards beside config and tokenizer.

`load` reads either; `hetero-async export --format huggingface` writes such a folder.
"""

import contextlib
import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from hetero_async.errors import UserError
from hetero_async.extras import extra

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
# What lies beside the weights in such a folder goes along with them; these are weights themselves, in whatever form.
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot"}
INDEX_SUFFIX = ".index.json"


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, or of a folder with one or with shards and their index. Raises UserError."""
    tensors: dict[str, torch.Tensor] = {}
    for file in _files(path):
        try:
            tensors |= safetensors.torch.load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: cannot be read: {error}") from None
    return tensors


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if not (path / INDEX).exists():
        if not (path / WEIGHTS).exists():
            raise UserError(f"{path}: holds neither {WEIGHTS} nor {INDEX}")
        return [path / WEIGHTS]
    try:
        names = sorted({str(name) for name in json.loads((path / INDEX).read_bytes())["weight_map"].values()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path / INDEX}: is not an index of shards: {error!r:.100}") from None
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{path / INDEX}: names {name!r:.60}, which is no file of its folder")
    return [path / name for name in names]


# --- writing ---


def check_pattern(like: Path) -> None:
    """Raises UserError for what cannot tell a folder's config."""
    if not like.is_dir():
        raise UserError(f"{like}: is not a folder; --like takes one with {CONFIG}, and the tokenizer's files if any")
    if not (like / CONFIG).is_file():
        raise UserError(f"{like}: holds no {CONFIG}: transformers could not tell which model this is")


def write_folder(
    out: Path, tensors: Mapping[str, torch.Tensor], tied: Collection[str], like: Path, shard_size: str
) -> None:
    """Make the folder `out`: shards of at most `shard_size` ("5GB"), and what lies beside the weights in `like`.

    It appears whole or not at all. Of tied parameters one is written, as transformers does; `tied` are the others'
    names. What the run did not train, because it was frozen, comes from the weights in `like`, where there are any.
    Raises UserError.
    """
    with extra("huggingface", "huggingface_hub"):
        from huggingface_hub import save_torch_state_dict
    whole = {name: value for name, value in {**_untrained(like, tensors), **tensors}.items() if name not in tied}
    unfinished = out.with_name(f"{out.name}.new")
    try:
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        unfinished.mkdir()
        save_torch_state_dict(whole, unfinished, max_shard_size=shard_size)
        for file in sorted(like.iterdir()):
            if _goes_along(file):
                shutil.copyfile(file, unfinished / file.name)
        _tell_dtype(unfinished / CONFIG)
        if out.is_dir():
            out.rmdir()  # it is empty
        unfinished.replace(out)
    except (OSError, ValueError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(unfinished)
        raise UserError(f"{out}: cannot be written: {error}") from None


def _untrained(like: Path, trained: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if not any((like / name).exists() for name in (WEIGHTS, INDEX)):
        return {}
    found = read_weights(like)
    strange = sorted(trained.keys() - found.keys())
    if strange and not trained.keys() & found.keys():
        raise UserError(
            f"{like}: its weights are of another model, which has no {strange[0]}; where the run's names begin "
            "with a prefix, take it off with --prefix"
        )
    return found


def _goes_along(file: Path) -> bool:
    is_weights = file.suffix in WEIGHT_SUFFIXES or file.name.endswith(INDEX_SUFFIX)
    return file.is_file() and not is_weights and not file.name.startswith(".")


def _tell_dtype(config: Path) -> None:
    """As transformers does when it saves: the config says what dtype the weights beside it have, which is fp32."""
    content = json.loads(config.read_text(encoding="utf-8"))
    for name in ("dtype", "torch_dtype"):  # since and before transformers 4.56
        if name in content:
            content[name] = "float32"
    config.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
