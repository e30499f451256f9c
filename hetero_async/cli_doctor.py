"""The verb that looks whether a host is fit for its part in the run: `doctor`. Thin, as those in cli.py."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import trio
import typer
from rich.console import Console
from rich.text import Text

from hetero_async.config import RunConfig
from hetero_async.doctor.findings import Finding

STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}
STATE_WIDTH = 9


def doctor(
    run: Annotated[Path, typer.Option("--run", help="The run's run.toml, on the host that is looked at.")] = Path(
        "run.toml"
    ),
    parameters: Annotated[float, typer.Option(help="The model's, if no checkpoint here tells; such as 7e9.")] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as one JSON object.")] = False,
) -> None:
    """Look whether this host is fit for its part in the run, and say what to do where it is not; changes nothing.

    Example: hetero-async doctor --run my-run/run.toml

    What its part is (server, standby, site) follows from run.toml and the keys that lie here. Exit code 1 when
    something failed; a running server, standby or worker is not disturbed.
    """
    from hetero_async.doctor import examination  # which needs all that a server, a standby and a site need

    config = RunConfig.load(run)
    findings: list[Finding] = []

    async def examine() -> None:
        findings.extend([finding async for finding in examination.examine(config, parameters)])

    trio.run(examine)
    has_failed = any(finding.state == "failed" for finding in findings)
    if as_json:
        told = {
            "role": examination.role(config),
            "failed": has_failed,
            "findings": [asdict(found) for found in findings],
        }
        print(json.dumps(told))
    else:
        print(f"{config.run.name}: this host is {examination.role(config)}")
        width = max(len(found.subject) for found in findings)
        for found in findings:
            state = Text(f"{found.state:<{STATE_WIDTH}}", style=STYLES[found.state])
            line = Text.assemble(state, f"{found.subject:<{width}}  {found.told}")
            Console(highlight=False).print(line, soft_wrap=True)
    if has_failed:
        raise typer.Exit(1)
