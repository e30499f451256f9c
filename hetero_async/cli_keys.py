"""The command line's verbs about keys: `join-site` on a site's host, `keys …` on the server's. All are thin."""

import json
from pathlib import Path
from typing import Annotated, Any

import trio
import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

from hetero_async import asking, roster
from hetero_async.config import RunConfig
from hetero_async.enrolment import Enrolment, ServerAddress
from hetero_async.enrolment import join_site as enrol
from hetero_async.shell.telemetry import LineObserver
from hetero_async.standby_enrolment import join_standby as enrol_standby

SCRIPT = "script"
RunOption = Annotated[Path, typer.Option("--run", help="The run's run.toml.")]

app = typer.Typer(
    help="Show who is let in, let others in, shut them out, make new keys; while the server runs or not.\n\n"
    "Example: hetero-async keys list --run my-run/run.toml",
    no_args_is_help=True,
)


class WithScript(TyperCommand):
    """All words after -- are the training script's, and no argument of ours."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = args[: args.index("--")] if "--" in args else args
        ctx.meta[SCRIPT] = args[len(own) + 1 :]
        return super().parse_args(ctx, own)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- SCRIPT...]"]


def join_site(
    context: typer.Context,
    address: Annotated[str, typer.Argument(metavar="ADDRESS#KEY", help="What `init` printed, in single quotes.")],
    site: Annotated[str, typer.Option(help="The name that this site shall have.")],
    directory: Annotated[Path, typer.Argument(help="Where run.toml, keys and outboxes will lie.")] = Path(),
    workers: Annotated[int, typer.Option(help="How many processes train here.")] = 1,
) -> None:
    """Make this site's keys, wait until the server's operator lets them in, then start the workers.

    Example: hetero-async join-site 'tcp://server.example:7710#…' --site amsterdam -- python train.py

    It can be stopped and said again at any time; keys that are there are kept.
    """
    enrolment = Enrolment(server=ServerAddress.parse(address), site=site, workers=workers, directory=directory)
    trio.run(enrol, enrolment, context.meta[SCRIPT], LineObserver(), _tell)


def join_standby(
    address: Annotated[str, typer.Argument(metavar="ADDRESS#KEY", help="What `init` printed, in single quotes.")],
    name: Annotated[str, typer.Option(help="Which standby of the server's run.toml this host is.")],
    directory: Annotated[Path, typer.Argument(help="Where run.toml, keys, log and checkpoints will lie.")] = Path(),
) -> None:
    """Make this standby's key, wait until the server's operator lets it in, then write its run.toml.

    Example: hetero-async join-standby 'tcp://server.example:7710#…' --name b my-run
    """
    server = ServerAddress.parse(address)
    enrolment = Enrolment(server=server, site=name, workers=1, directory=directory, is_standby=True)
    trio.run(enrol_standby, enrolment, LineObserver(), _tell)


@app.command("list")
def list_keys(
    run: RunOption = Path("run.toml"),
    as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON, one object a key.")] = False,
) -> None:
    """Show all keys that are let in, and who their holders are.

    Example: hetero-async keys list --run my-run/run.toml
    """
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("role", "site", "name", "key"):
        table.add_column(column, no_wrap=True, overflow="ignore")
    config = RunConfig.load(run)
    for peer in roster.listed(config):
        row = (peer.role, peer.site, peer.worker, peer.key.decode())
        if as_json:
            print(json.dumps(dict(zip(("role", "site", "name", "key"), row, strict=True))))
        table.add_row(*row)
    if not as_json:
        Console(markup=False, highlight=False).print(table, soft_wrap=True)
        print(f"\nanother site joins with:\n    {roster.join_line(config)}")


@app.command()
def allow(
    keys: Annotated[list[str], typer.Argument(metavar="KEY...", help="Public keys, each in single quotes.")],
    site: Annotated[str, typer.Option(help="Whose workers' keys they are, in the workers' order.")] = "",
    standby: Annotated[str, typer.Option(help="Instead: the standby of run.toml whose key it is.")] = "",
    replace: Annotated[bool, typer.Option("--replace", help="In the place of the keys that they have now.")] = False,
    run: RunOption = Path("run.toml"),
) -> None:
    """Let keys in, from their next message on; `join-site` prints the line to say.

    Example: hetero-async keys allow 'KEY' 'KEY' --site amsterdam
    """
    for line in roster.allow(RunConfig.load(run), keys, site=site, standby=standby, replace=replace):
        print(line)


@app.command()
def revoke(
    who: Annotated[list[str] | None, typer.Argument(metavar="WHO...", help="Names or keys.")] = None,
    site: Annotated[str, typer.Option(help="All keys of this site.")] = "",
    run: RunOption = Path("run.toml"),
) -> None:
    """Shut keys out, from their next message on; what is acknowledged stays.

    Example: hetero-async keys revoke amsterdam-0
    """
    for line in roster.revoke(RunConfig.load(run), who or [], site):
        print(line)


@app.command()
def rotate(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="Whose; see below.")] = None,
    run: RunOption = Path("run.toml"),
) -> None:
    """Make new keys in the place of this host's, and say what each side must do for them to count.

    Without a name: on the server's host the server's key, on a site's those of all its workers.

    Example: hetero-async keys rotate
    """
    for line in roster.rotate(RunConfig.load(run), names or []):
        print(line)


@app.command()
def lift(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A quarantined key, as `status` shows it.")],
    run: RunOption = Path("run.toml"),
) -> None:
    """Hear a key again that was shut out for what it sent, when that is mended. The server must be running.

    Example: hetero-async keys lift 'KEY'
    """
    print(f"{trio.run(asking.lift, RunConfig.load(run), key)} is heard again")


def _tell(line: str) -> None:
    print(line, flush=True)
