"""`hetero-async restore`: a server's log and checkpoint from the archive alone.

Everything is fetched, put together and verified beside the place where it shall lie; the log appears there last, with
one rename. Interrupted before that, the same command goes on with what has been fetched.
"""

import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from hetero_async.errors import ConfigError, UserError
from hetero_async.ports import Archive
from hetero_async.shell.archive import open_archive
from hetero_async.shell.retrieval import listed
from hetero_async.unarchiving import RESTORING, Restored, restore_run


def restore(
    directory: Annotated[Path, typer.Argument(help="Where log and checkpoints shall lie: the server's directory.")],
    archive: Annotated[
        str, typer.Option("--from", metavar="URL", help="s3://BUCKET/PREFIX, gs://…, az://… or a path.")
    ],
    run_name: Annotated[str, typer.Option(help="Which run, if the archive holds several.")] = "",
) -> None:
    """Rebuild a server's log and checkpoint from the archive, verify them, and say how fresh they are.

    Example: hetero-async restore my-run --from s3://bucket/prefix
    """
    with Progress(transient=True) as progress:
        fetching = progress.add_task("fetching", total=None)
        verifying = progress.add_task("verifying records", total=None)

        def fetched(name: str) -> None:
            progress.console.print(f"fetched     {name}", soft_wrap=True, highlight=False, markup=False)
            progress.advance(fetching)

        restored = restore_directory(
            directory, archive, run_name, fetched, lambda lsn: progress.update(verifying, completed=lsn)
        )
    for line in restored.lines(datetime.now(UTC)):
        print(line)


def restore_directory(
    directory: Path, url: str, run_name: str, fetched: Callable[[str], None], verified: Callable[[int], None]
) -> Restored:
    """Raises UserError, ArchiveAway, DiskFull, and LogCorrupt when what was archived does not keep the promises."""
    _refuse_used(directory)
    archive = open_archive(url, Path.cwd())
    return restore_run(archive, run_name or _only_run(archive, url), directory, fetched, verified)


def _refuse_used(directory: Path) -> None:
    """What an interrupted restore left may go; nothing else."""
    staging = directory / RESTORING
    if (directory / "log").exists() and staging.exists() and not (staging / "log").exists():
        shutil.rmtree(staging)
        raise UserError(
            f"{directory}: an earlier restore was done with it; look with: hetero-async verify {directory}/log"
        )
    for name in ("log", "checkpoints"):
        path = directory / name
        is_ours = name == "checkpoints" and staging.exists()
        if path.exists() and not is_ours and any(path.iterdir()):
            raise ConfigError(f"{path}: there is something already; move it away, or choose another directory")


def _only_run(archive: Archive, url: str) -> str:
    runs = sorted({name.split("/")[0] for name in listed(archive) if "/" in name})
    if len(runs) != 1:
        found = f"holds {len(runs)} runs ({', '.join(runs)}): say which with --run-name" if runs else "holds no run"
        raise UserError(f"the archive {url} {found}")
    return runs[0]
