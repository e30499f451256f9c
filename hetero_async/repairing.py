"""`hetero-async repair`: a damaged log gets back exactly the records that it lost, from another node or the archive.

For a node that does not run. What makes it safe is in shell/mending.py: each record proves itself by the chain.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import trio
import typer
from rich.progress import Progress

from hetero_async.asking import asked, endpoints
from hetero_async.complaints import SERVER
from hetero_async.config import Node, RunConfig
from hetero_async.core.messages import RECORDS, Chunk, Fence, Gone
from hetero_async.core.ranges import normal
from hetero_async.core.records import Entry
from hetero_async.errors import ConfigError, HeteroAsyncError, LogCorrupt, UserError, first_error
from hetero_async.formats.shipment import unpack_shipment
from hetero_async.shell.archive import open_archive
from hetero_async.shell.dial import DialLink, Endpoint, open_dial_link
from hetero_async.shell.disk import DISK, Disk
from hetero_async.shell.log import lock_directory
from hetero_async.shell.mending import Fetch, Mended, Mending
from hetero_async.shell.retrieval import Retrieval
from hetero_async.shell.telemetry import NullObserver
from hetero_async.standby import OBJECT_BYTES_MAX
from hetero_async.transfers import Pull
from hetero_async.watch.verify import Verdict

# Beside the log, as long as it is mended: what came from the archive.
REPAIRING = "repairing"
# A node that has said nothing new for so long is given up.
PATIENCE_SECONDS = 30.0
ASK_AGAIN_SECONDS, SEND_AGAIN_SECONDS = 1.0, 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaired:
    """What was damaged, and what the whole log comes to now; None: nothing was."""

    log: Path
    source: str
    mended: Sequence[Mended]
    verdict: Verdict | None
    warnings: Sequence[str]

    def lines(self) -> list[str]:
        """For people."""
        if self.verdict is None:
            return [f"{self.log}: no record is damaged, and nothing was changed"]
        return [
            *(f"warning     {warning}" for warning in self.warnings),
            *(line for mended in self.mended for line in self._lines(mended)),
            *self.verdict.lines(),
            f"state       {self.verdict.state.digest().hex()} at record {self.verdict.state.lsn}",
        ]

    def _lines(self, mended: Mended) -> Iterator[str]:
        stretches = normal([(lsn, lsn + 1) for lsn in mended.lsns])
        told = ", ".join(f"{first}" if stop == first + 1 else f"{first} to {stop - 1}" for first, stop in stretches)
        came = f"record {told} from {self.source}" if told else "nothing but what stood between records"
        yield f"mended      {mended.path}: {came}; as it was: {mended.aside.name}"
        if mended.is_cut:
            yield f"may lack    records after {self.verdict and self.verdict.state.lsn}, if {mended.path.name} held any"


def repair(
    source: Annotated[
        str, typer.Option("--from", metavar="NODE|URL", help="Another node's name or address, or the archive.")
    ],
    run: Annotated[Path, typer.Option("--run", help="The run's run.toml.")] = Path("run.toml"),
    name: Annotated[str, typer.Option(help="Whose log to mend: server, or a [standbys.NAME] of run.toml.")] = SERVER,
) -> None:
    """Mend the log of a node that halted on damaged records: fetch these, and no others, from elsewhere.

    Example: hetero-async repair --from b; or from an archive: hetero-async repair --from s3://bucket/prefix
    """
    with Progress(transient=True) as progress:
        verifying = progress.add_task("verifying records", total=None)
        repaired = repair_node(RunConfig.load(run), name, source, lambda lsn: progress.update(verifying, completed=lsn))
    for line in repaired.lines():
        print(line)


def repair_node(
    config: RunConfig, name: str, source: str, verified: Callable[[int], None], disk: Disk = DISK
) -> Repaired:
    """Raises ConfigError (in use), UserError (no help there), ArchiveAway, and LogCorrupt when it stays unsound."""
    node = config.node(name)
    if not node.log.is_dir():
        raise ConfigError(f"{node.log}: there is no log here")
    scratch, warnings = node.directory / REPAIRING, list[str]()
    fetch = _fetch_from(config, name, source, scratch, warnings)
    lock = lock_directory(node.log, disk)
    try:
        mended = list(Mending(node.log, config.run.name, source, fetch, disk).mend())
        verdict = _verified(node, verified) if mended else None
        shutil.rmtree(scratch, ignore_errors=True)
    finally:
        os.close(lock)
    return Repaired(log=node.log, source=source, mended=mended, verdict=verdict, warnings=warnings)


def _verified(node: Node, progress: Callable[[int], None]) -> Verdict:
    from hetero_async.looking import verify_directory  # it imports torch, see cli.py

    verdict = verify_directory(node.log, progress)
    if not verdict.is_ok:
        raise LogCorrupt("\n".join([f"{node.log} does not keep the promises", *verdict.lines()]))
    return verdict


def _fetch_from(config: RunConfig, name: str, source: str, scratch: Path, warnings: list[str]) -> Fetch:
    """Whatever `--from` names."""
    if source in (name, config.node(name).control):
        raise UserError(f"--from {source}: that is the log to mend; name another node, or an archive")
    others = [other for other in endpoints(config, without=name) if source in (other.name, other.control)]
    if others:
        secret = config.keys / f"{name}.secret"
        return lambda lsn, _: trio.run(_ask_node, others[0], secret, lsn)
    if source.startswith("tcp://"):
        raise UserError(f"--from {source}: no node of {config.path} has this address")
    archive = open_archive(source, Path.cwd())
    retrieval = Retrieval(
        archive=archive, run=config.run.name, scratch=scratch, fetched=lambda _: None, warnings=warnings
    )
    return retrieval.stretch


# --- another node ---


async def _ask_node(other: Endpoint, secret: Path, lsn: int) -> tuple[bytes, list[Entry]]:
    """Records from that one on; none when the node has not got it."""
    with trio.move_on_after(PATIENCE_SECONDS) as patience:
        async with open_dial_link([other], secret_path=secret, observer=NullObserver()) as link:
            position = await asked(link, Fence(term=0))
            if lsn > position.lsn:
                return b"", []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_keep_alive, link)
                blob = await _pull(link, lsn, patience)
                nursery.cancel_scope.cancel()
            return unpack_shipment(blob) if blob else (b"", [])
    reason = link.problem or "no answer"
    raise HeteroAsyncError(f"{other.name} at {other.control} has not sent record {lsn} in time: {reason}")


async def _keep_alive(link: DialLink) -> None:
    """A link on which nothing is asked is taken for a broken one."""
    while True:
        await link.control.send(link.server.key, Fence(term=0))
        with trio.move_on_after(ASK_AGAIN_SECONDS):
            while True:
                await link.control.receive()


async def _pull(link: DialLink, lsn: int, patience: trio.CancelScope) -> bytes:
    """A shipment that begins with that record; empty when it is not held there (any more)."""
    pull = Pull(RECORDS, lsn, _now_ms(), OBJECT_BYTES_MAX)
    wants = pull.wants()
    while True:
        for want in wants:
            while not await link.bulk.send(link.server.key, want):  # noqa: ASYNC110, the caller's deadline ends it
                await trio.sleep(SEND_AGAIN_SECONDS)
        wants = []
        with trio.move_on_after(ASK_AGAIN_SECONDS):
            incoming = await link.bulk.receive()
            match incoming.message:
                case Chunk(kind=kind, number=number) as chunk if (kind, number) == (RECORDS, lsn):
                    if pull.is_another(chunk):  # it has grown since it was first asked for
                        pull = Pull(RECORDS, lsn, _now_ms(), OBJECT_BYTES_MAX)
                    pull.add(chunk, incoming.payload, _now_ms())
                    patience.deadline = trio.current_time() + PATIENCE_SECONDS
                    wants = pull.wants()
                case Gone(kind=kind, number=number) if (kind, number) == (RECORDS, lsn):
                    return b""
        if pull.is_complete:
            assert pull.assembly is not None
            return pull.assembly.result()
        if pull.is_stalled(_now_ms()):
            wants = pull.ask_again(_now_ms())


def _now_ms() -> int:
    return int(trio.current_time() * 1000)


# --- what a halted node says ---


@contextlib.contextmanager
def told_how_to_mend(run: Path, name: str) -> Iterator[None]:
    """A LogCorrupt in here names the command that may help."""
    try:
        yield
    except* LogCorrupt as group:
        raise LogCorrupt(
            f"{first_error(group)}; damaged records can be fetched again: "
            f"hetero-async repair --run {run} --name {name} --from NODE|ARCHIVE"
        ) from None
