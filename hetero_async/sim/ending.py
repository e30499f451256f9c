"""What is judged when a world has ended: each node's log, what the archive gives back, and a log that is mended."""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from hetero_async.core.records import Entry
from hetero_async.core.state import State
from hetero_async.errors import HeteroAsyncError, LogCorrupt, UserError
from hetero_async.formats.salvage import salvage
from hetero_async.looking import verify_directory
from hetero_async.shell.mending import Fetch, Mending
from hetero_async.shell.retrieval import Retrieval
from hetero_async.shell.segments import first_lsn_of, read_linked, segment_paths
from hetero_async.sim.archive import SimulatedArchive
from hetero_async.sim.plan import SERVER
from hetero_async.unarchiving import restore_run

if TYPE_CHECKING:
    from hetero_async.sim.world import World

ARCHIVE = "archive"
# So many records one answer holds at most, where another node is asked.
SHIPPED_MAX = 8


class Ending:
    """Of a world whose workers have all come to their end."""

    def __init__(self, world: "World", directory: Path) -> None:
        self._world = world
        self._judge = world.judge
        self._run = world.plan.settings.run
        self._directory = directory

    def judged(self) -> int:
        """Acknowledged deltas of which some node's log knows nothing."""
        judge, world = self._judge, self._world
        judge.finished(world.plan.settings.samples)
        states = {node: state for node in world.plan.nodes if (state := self._verified(node)) is not None}
        if judge.violation is not None:
            return 0
        lost = min((judge.lost(state) for state in states.values()), default=judge.acknowledged)
        archived = self._judge_archived(world.archive) if world.archive is not None else 0
        self._judge_mended(world.random("repair"), states, archived)
        return lost

    def _verified(self, node: str) -> State | None:
        """As a power cut would leave it, it is the run's as far as it goes."""
        self._world.processes[node].kill()
        self._world.disks[node].cut_power()
        log = self._log(node)
        if node != SERVER and not segment_paths(log):
            return None  # it stood by for nothing yet
        try:
            verdict = verify_directory(log, lambda _: None)
        except UserError:
            return None  # a log without a record
        except HeteroAsyncError as error:
            self._judge.violated("3", f"verify: {error}")
            return None
        if not verdict.is_ok:
            self._judge.violated("3", f"verify finds the log of {node} wanting")
        self._judge.recovered(node, verdict.state, verdict.model_hash)
        return verdict.state

    def _log(self, node: str) -> Path:
        return self._world.disks[node].root / "log"

    def _judge_archived(self, archive: SimulatedArchive) -> int:
        """What comes back from the archive alone is the run as far as it goes. Up to which record that was promised."""
        archive.is_well = True
        archiving = self._world.serving.archiving if self._world.serving is not None else None
        told = max(archiving.lsn, archiving.checkpoint_lsn) if archiving is not None else 0
        try:
            restored = restore_run(archive, self._run, self._directory / "restored", lambda _: None, lambda _: None)
        except HeteroAsyncError as error:
            if told:  # before, part of something may be there
                self._judge.violated("archive", f"record {told} was called archived; restore: {error}")
            return 0
        state = restored.verdict.state
        self._judge.recovered("archive", state, restored.verdict.model_hash)
        if state.lsn < told:
            self._judge.violated("archive", f"record {told} was called archived, and {state.lsn} is the last there")
        return archiving.lsn if archiving is not None else 0

    def _judge_mended(self, random: Random, states: dict[str, State], archived: int) -> None:
        """A bit of one node's log rots: where another holds those records, the log becomes what it was."""
        story = self._judge.story
        nodes = [node for node, state in states.items() if story.has(state.lsn, state.term)]
        sources = [*nodes, *([ARCHIVE] if archived else [])]
        if not nodes:
            return
        damaged = random.choice(nodes)
        sources.remove(damaged)
        segments = segment_paths(self._log(damaged))
        place = random.randrange(len(segments))
        segment, is_last = segments[place], place + 1 == len(segments)
        sure = _sure_bytes(segment, is_last)
        if not sources or not sure:
            return
        last_lsn = states[damaged].lsn if is_last else first_lsn_of(segments[place + 1]) - 1
        disk = self._world.disks[damaged]
        disk.process = None  # whoever mends is no part of the world
        disk.flip_bit(segment, sure)
        source = random.choice(sources)
        if source == ARCHIVE:
            fetch, is_held = self._from_archive(), last_lsn <= archived
        else:
            fetch, oldest = self._from_node(source, random), segment_paths(self._log(source))[0]
            is_held = first_lsn_of(oldest) <= first_lsn_of(segment) and last_lsn <= states[source].lsn
        name = f"{segment.name} of {damaged}, mended from {source}"
        try:
            mended = list(Mending(self._log(damaged), self._run, source, fetch, disk).mend())
        except UserError as error:
            if is_held:
                self._judge.violated("repair", f"{name}: {error}")
            return
        after = self._verified(damaged)
        if not mended or after is None or after.digest() != states[damaged].digest():
            self._judge.violated("repair", f"{name}, is not what it was")

    def _from_node(self, node: str, random: Random) -> Fetch:
        def fetch(lsn: int, _: bytes | None) -> tuple[bytes, Sequence[Entry]]:
            try:
                linked = list(read_linked(self._log(node), self._run, lsn - 1))
            except LogCorrupt:  # it begins later
                linked = []
            shipped = linked[: random.randint(1, SHIPPED_MAX)]
            return (shipped[0][0] if shipped else b""), [entry for _, entry in shipped]

        return fetch

    def _from_archive(self) -> Fetch:
        assert self._world.archive is not None
        scratch = self._directory / "repairing"
        return Retrieval(archive=self._world.archive, run=self._run, scratch=scratch, fetched=lambda _: None).stretch


def _sure_bytes(segment: Path, is_last: bool) -> int:
    """So many bytes hold records of which a later one tells that they were durable: damage there is no torn tail."""
    records = list(salvage(segment.read_bytes()))
    durable_lsn = max((record.durable_lsn for record in records), default=0)
    return max((record.end for record in records if not is_last or record.lsn <= durable_lsn), default=0)
