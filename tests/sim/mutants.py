"""Known-bad changes to the real code, and a process in which one of them is in force.

Nothing of the package may be imported here, or the mutant's process would hold the unchanged code.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "hetero_async"


@dataclass(frozen=True, slots=True)
class Mutant:
    """`old` stands once in the file.

    `faults`: kinds to look among, where random worlds would need too long; `first`: the world to begin with, so
    that the test does not spend its time on those that are known to find nothing.
    """

    name: str
    file: str
    old: str
    new: str
    faults: tuple[str, ...] = ()
    first: int = 0


# What happens to servers where there are several.
CLUSTER = ("kill server", "kill standby", "cut servers apart", "lose the server's site", "lose the witness", "promote")

MUTANTS = (
    Mutant(
        "acknowledged before it is written",
        "serve.py",
        """            if ready.records:
                await self._append(ready.records)""",
        """            await self._send(ready)
            if ready.records:
                await self._append(ready.records)""",
        first=1,
    ),
    Mutant(
        "a publish leaves out what the buffers have become",
        "tensors/model.py",
        "changes_between(self._standing.buffers, self.buffers)",
        "{}",
        first=3,
    ),
    Mutant("no fdatasync", "shell/log.py", "self._disk.fdatasync(self._segment)", "pass"),
    Mutant(
        "a failed fdatasync is ignored",
        "shell/log.py",
        "with fatal(self._path, self._disk):\n            self._disk.fdatasync(self._segment)",
        "with contextlib.suppress(OSError):\n            self._disk.fdatasync(self._segment)",
        ("failing fsync",),
    ),
    Mutant(
        "no fsync of the directory after a new segment",
        "shell/log.py",
        "            self._disk.rename(temporary, path)\n            sync_directory(self.directory, self._disk)",
        "            self._disk.rename(temporary, path)",
    ),
    Mutant(
        "no fsync of a new segment",
        "shell/log.py",
        "            self._disk.fsync(segment)\n            self._disk.rename(temporary, path)",
        "            self._disk.rename(temporary, path)",
        first=12,
    ),
    Mutant(
        "damage in the middle is taken for a torn tail",
        "formats/segment.py",
        "return self._is_last and not self._was_whole(unfinished.resume_at)",
        "return self._is_last",
        ("damage log",),
        first=13,
    ),
    Mutant(
        "checkpoint without fsync of its directory",
        "shell/store.py",
        "        self._disk.rename(unfinished, path)\n        sync_directory(self.directory, self._disk)",
        "        self._disk.rename(unfinished, path)",
        first=7,
    ),
    Mutant(
        "a checkpoint is not checked when it is read",
        "shell/store.py",
        "if file_hash != manifest.file_hash:",
        "if False:",
        ("damage checkpoint", "kill server"),
        first=6,
    ),
    Mutant(
        "the log is dropped too early",
        "checkpoints.py",
        "self._drop_log(covered)",
        "self._drop_log(checkpoint.lsn)",
        ("damage checkpoint", "kill server"),
        first=27,
    ),
    Mutant(
        "the dedupe table is not in the checkpoint",
        "core/state.py",
        "        return asdict(self)",
        "        kept = asdict(self)\n        for member in kept['members'].values():\n"
        "            member['last_seq'] = 0\n        return kept",
        first=7,
    ),
    Mutant(
        "a delta that is said again is admitted again",
        "core/admission.py",
        "    if push.seq == member.last_seq:\n",
        "    if push.seq < 0:\n",
        first=11,
    ),
    Mutant(
        "staleness is measured from the wrong version",
        "core/admission.py",
        "if state.staleness(anchor_version) > bound:",
        "if state.staleness(state.version) > bound:",
        first=2,
    ),
    Mutant(
        "a lease is granted without a record",
        "core/server.py",
        "            self._record(Leased(worker=event.worker, ranges=granted))",
        "            pass",
    ),
    Mutant(
        "a worker that comes back keeps what others hold",
        "core/server.py",
        "kept = state.ledger.claimable(worker, ranges.normal(hello.claims), books)",
        "kept = ranges.normal(hello.claims)",
        first=33,
    ),
    Mutant(
        "chance in apply",
        "tensors/model.py",
        "stepped.gain, stepped.pull)",
        "stepped.gain * (1 + 1e-3 * __import__('random').random()), stepped.pull)",
    ),
    Mutant(
        "a clock in apply",
        "tensors/model.py",
        "stepped.gain, stepped.pull)",
        "stepped.gain * (1 + 1e-3 * (__import__('time').monotonic() % 1)), stepped.pull)",
    ),
    Mutant(
        "the shadow moves without a record",
        "tensors/model.py",
        "        self._norm = passes.merge(",
        "        self._standing.shadow.add_(1e-3)\n        self._norm = passes.merge(",
    ),
    Mutant(
        "a chunk that comes twice counts twice",
        "formats/chunks.py",
        "        if self._chunks[index] is None:\n            self._chunks[index]",
        "        if True:\n            self._chunks[index]",
        ("double messages", "thin link"),
        first=1,
    ),
    Mutant(
        "a restart forgets the outbox",
        "train.py",
        "for seq, (push, payload) in (await self.blocking(self.outbox.load)).items():",
        "for seq, (push, payload) in (await self.blocking(self.outbox.load) and {}).items():",
        ("kill worker", "kill server"),
        first=2,
    ),
    Mutant(
        "a delta is offered before it is in the outbox",
        "train.py",
        "        for push in owed.saves:\n            await self._save(push)\n",
        "        for message in owed.bulk:\n            await self.link.bulk.send(self.link.server.key, message)\n"
        "        for push in owed.saves:\n            await self._save(push)\n",
        ("kill worker",),
        first=200,
    ),
    Mutant(
        "numbers begin again after a restart",
        "core/worker.py",
        "        self.seq = max(self.seq, welcome.last_seq)\n",
        "",
        ("kill worker", "kill server"),
        first=9,
    ),
    Mutant(
        "a target that lacks the newest round is taken",
        "desk.py",
        "return target if target is not None and target.rounds == self.rounds else None",
        "return target",
        first=4,
    ),
    Mutant(
        "what was pushed is pushed again",
        "tensors/replica.py",
        "            piece.sub_(local)\n            base.copy_(local)",
        "            piece.sub_(local)",
    ),
    Mutant(
        "a refused delta still counts as own progress",
        "core/worker.py",
        "            self.unmerged.remove(nack.seq)",
        "            pass",
        first=2,
    ),
    Mutant(
        "a late answer to a request for samples is not taken",
        "core/worker.py",
        "            self._lease_ms = now_ms\n",
        "            self._lease_ms = now_ms\n            self._lease_number += 1\n",
        ("slow disk",),
    ),
    Mutant(
        "a server that nobody trains with never sleeps",
        "core/pace.py",
        "            self.deadline_ms = None\n            return False",
        "            return False",
        first=2,
    ),
    Mutant(
        "a silent worker keeps its leases for ever",
        "core/server.py",
        "for worker in self.presences.silent(self.state.active, now_ms, self._ttl_ms):",
        "for worker in ():",
        ("kill worker", "lose site"),
    ),
    Mutant(
        "what the archive has not taken is called archived",
        "archiving.py",
        "                await self._insisting(self._archive.put_new, name, content)\n",
        "                with contextlib.suppress(ArchiveAway):\n"
        "                    await self._network(self._archive.put_new, name, content)\n",
        first=16,
    ),
    Mutant(
        "a refused push leaves its residual behind",
        "tensors/feedback.py",
        "                    self._left_out.pop(seq, None)\n",
        "                    pass\n",
        first=18,
    ),
    Mutant(
        "what is left out of a push is forgotten",
        "tensors/feedback.py",
        "torch.add(delta, residual, alpha=DECAY)",
        "delta",
        first=12,
    ),
    Mutant(
        "another publish is measured than is said",
        "train.py",
        "anchor = Anchor(machine.shadow, machine.shadow_term)",
        "anchor = Anchor(machine.shadow - 1, machine.shadow_term)",
        first=3,
    ),
    Mutant(
        "books together have more than the run",
        "core/ledger.py",
        "return ranges.take(ranges.intersection(self.free, self.all_of(book)), self.room)[0]",
        "return ranges.intersection(self.free, self.all_of(book))",
        first=3,
    ),
    # --- several servers ---
    Mutant(
        "acknowledged before a standby has confirmed",
        "core/replication.py",
        "min(lsn, self._releasable(now_ms, lsn))",
        "lsn",
        CLUSTER,
    ),
    Mutant(
        "what waits for a confirmation leaves at once",
        "core/post.py",
        "if lsn <= released]",
        "]",
        CLUSTER,
    ),
    Mutant(
        "a standby confirms before its fsync",
        "standby.py",
        "            self.machine.is_storing = True\n",
        "            await self._tell(Stored(now_ms=_now_ms(), lsn=entries[-1].lsn, last_term=entries[-1].term))\n",
        CLUSTER,
        first=3,
    ),
    Mutant(
        "the place is claimed without all that was acknowledged",
        "core/standby.py",
        "if reign.partner == self.name and reign.term >= self.last_term:",
        "if reign.term >= self.last_term:",
        CLUSTER,
        first=16,
    ),
    Mutant(
        "a server that may go on alone does so although it has a partner",
        "core/replication.py",
        "(may_be_alone and not self._partners())",
        "may_be_alone",
        CLUSTER,
        first=2,
    ),
    Mutant(
        "what was fetched for a damaged log is not written",
        "shell/mending.py",
        "                segment.pieces.append(packed)\n",
        "",
        CLUSTER,
    ),
)


def plant(mutant: Mutant, directory: Path) -> None:
    """A copy of the package in `directory`, with that one change."""
    shutil.copytree(PACKAGE, directory / "hetero_async", ignore=shutil.ignore_patterns("__pycache__"))
    path = directory / "hetero_async" / mutant.file
    source = path.read_text()
    assert source.count(mutant.old) == 1, f"{mutant.file} holds {mutant.old!r} {source.count(mutant.old)} times"
    path.write_text(source.replace(mutant.old, mutant.new))


def seeds_until_caught(mutant: Mutant, directory: Path, most: int) -> tuple[int, str]:
    """Run worlds 0, 1, … with the mutant's code until one fails: how many it took, and what broke ("" for nothing)."""
    plant(mutant, directory)
    for name in [name for name in sys.modules if name.partition(".")[0] == "hetero_async"]:
        del sys.modules[name]
    sys.path.insert(0, str(directory))
    from hetero_async.sim import runner

    assert Path(runner.__file__).is_relative_to(directory), "the mutant is not what runs"
    for count, seed in enumerate(range(mutant.first, mutant.first + most), 1):
        outcome = runner.run_seed(seed, kinds=mutant.faults)
        if outcome.violation is not None:
            return count, f"{outcome.violation.invariant}: {outcome.violation.what}"
    return most, ""
