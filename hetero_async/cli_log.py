"""The verbs about who did what, read off a run's log: audit, report, replay. Thin, as in cli.py, which lists them."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from hetero_async.watch.audit import render

LogArgument = Annotated[Path, typer.Argument(metavar="LOG_DIR", help="The run's log directory.")]


def audit(
    log: LogArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as one JSON object, with whole keys.")] = False,
) -> None:
    """Show who contributed what, by key: deltas, samples, norms, and what was refused; changes nothing.

    Example: hetero-async audit my-run/log
    """
    from hetero_async import looking

    audited = looking.audit_directory(log)
    if as_json:
        print(json.dumps(audited.summary()))
    else:
        Console().print(render(audited))


def report(
    run: Annotated[
        Path, typer.Option("--run", metavar="RUN_TOML|DIRECTORY", help="The run: its run.toml, or a node's directory.")
    ] = Path("run.toml"),
    out: Annotated[Path, typer.Option(metavar="OUT.html", help="Where the page goes.")] = Path("report.html"),
) -> None:
    """Write the dashboard of a run that has ended, died or goes on, as one HTML file that needs nothing else.

    Example: hetero-async report --run my-run/run.toml --out report.html
    """
    from hetero_async import reporting

    print(reporting.write_report(run, out))


def replay(
    log: LogArgument,
    without: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY|WORKER", help="Leave this one's deltas out; may be said again for others."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="OUT.safetensors", help="Where the parameters go, under their own names.")
    ] = None,
) -> None:
    """Rebuild the run's parameters as if somebody had never taken part, and say how far that leads.

    What the others sent stays as it was, although they trained beside the one left out. It needs the log from before
    the first delta of that one: keep_log = true in run.toml keeps all of it.

    Example: hetero-async replay my-run/log --without office-0 --out model.safetensors
    """
    from hetero_async import looking

    with Progress(transient=True) as progress:
        task = progress.add_task("records", total=None)
        rebuilt = looking.replay_without(log, without or [], out, lambda lsn: progress.update(task, completed=lsn))
    for line in rebuilt.lines():
        print(line)
    if out is not None:
        print(f"wrote {out}")
