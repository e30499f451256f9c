"""The verb `export`: a run's newest parameters as a file, or as a folder that transformers loads."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hetero_async.config import RunConfig
from hetero_async.errors import UserError


class Format(StrEnum):
    SAFETENSORS = "safetensors"
    HUGGINGFACE = "huggingface"


def export(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="OUT.safetensors, or the folder to make.")],
    run: Annotated[Path, typer.Option("--run", help="The run's run.toml.")] = Path("run.toml"),
    format: Annotated[Format, typer.Option(help="One file, or a folder for transformers.")] = Format.SAFETENSORS,
    like: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Whose config.json and tokenizer go along, and weights not trained."),
    ] = None,
    prefix: Annotated[str, typer.Option(help="Take this off the names, and leave out all others.")] = "",
    shard_size: Annotated[str, typer.Option(help="The most bytes of one file of the folder.")] = "5GB",
    best: Annotated[bool, typer.Option("--best", help="Instead: those that were measured best (keep_best).")] = False,
) -> None:
    """Write the newest parameters under the model's own names.

    Example: hetero-async export model.safetensors; then in Python ha.load("model.safetensors", model)

    With --format huggingface --like FOLDER it makes a folder for AutoModel.from_pretrained; FOLDER is what the model
    was begun from, or one in which its config and tokenizer were saved.
    """
    from hetero_async import looking

    config = RunConfig.load(run)
    if best:
        if format is Format.HUGGINGFACE:
            raise UserError("--best writes one safetensors file; leave out --format huggingface")
        kept = looking.export_best(config, out)
        print(f"wrote {out}: version {kept.version}, {kept.name} {kept.value:.6g}")
        return
    if format is Format.HUGGINGFACE:
        if like is None:
            raise UserError("--format huggingface needs --like FOLDER: config.json and tokenizer are taken from there")
        state = looking.export_folder(config, out, like, prefix, shard_size)
    elif like is not None or prefix:
        raise UserError("--like and --prefix go with --format huggingface")
    else:
        state = looking.export(config, out)
    print(f"wrote {out}: version {state.version}")
