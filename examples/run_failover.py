"""The loss of a whole site, on one machine: server in amsterdam, standby in shanghai, workers there and in the office.

    make run-local-failover

At half time every process of amsterdam is killed at once: the server, its two workers, the agent that would start them
again, and the member of etcd that stands there. The standby takes over by itself and training goes on. Later amsterdam
comes back: its workers, and its old server as a standby, which cuts off what it never got confirmed. It ends with the
figures and a picture in runs/failover.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio
from conductor import (
    ONCE,
    SITES,
    TRAINING,
    VERIFIED,
    Conductor,
    Promise,
    clear,
    curve,
    end,
    errors_in_one_line,
    free_address,
    losses,
    options,
    outputs,
    show,
    told_kills,
)
from etcd_local import LocalCluster, require_etcd
from rich.console import Console
from rich.live import Live

from hetero_async import looking, roster
from hetero_async.complaints import SERVER
from hetero_async.config import RunConfig
from hetero_async.core.records import Delta
from hetero_async.reporting import write_report
from hetero_async.shell.outbox import ACKNOWLEDGED
from hetero_async.shell.segments import end_of, read_log
from hetero_async.tables import template
from hetero_async.watch.report import draw_loss
from hetero_async.watch.verify import Verdict

LOST_SITE, LOST_MEMBER, STANDBY = "amsterdam", 0, "shanghai"
KILL_AT, RETURN_AT = 0.5, 0.7
LEASE_SECONDS = 2.0
# An acknowledgement is seen so much later than it is noted, at most: it is in takeover_seconds.
NOTE_LOOK_SECONDS = 0.02
# The lease has to run out; what comes then takes a second on a busy machine.
TAKEOVER_SECONDS_MAX = 5.0
PROMISES = (
    Promise(lambda report: report["acknowledged_lost"] == 0, "{acknowledged_lost} acknowledged deltas were lost"),
    ONCE,
    VERIFIED,
    Promise(
        lambda report: report["takeover_seconds"] <= TAKEOVER_SECONDS_MAX,
        f"the takeover lasted {{takeover_seconds}} s, above {TAKEOVER_SECONDS_MAX:g}",
    ),
    Promise(lambda report: report["old_server_level"], "the old server is not level with the new one"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What a worker noted as acknowledged, and when somebody saw that."""

    seconds: float
    worker: str
    seq: int


class SiteLoss(Conductor):
    """Kills a site, has it return, and is over when all workers have ended and both servers are level."""

    def __init__(self, config: RunConfig, cluster: LocalCluster, device: str = "cpu") -> None:
        super().__init__(config, device)
        self._cluster = cluster
        self.notes: list[Note] = []
        self.tail = 0  # records that the killed server had, and the one after it had not
        self.returned = math.inf

    def start_all(self) -> None:
        run = str(self.config.path)
        self.start(SERVER, "serve", "--run", run)
        self.start(f"{STANDBY}-standby", "standby", "--name", STANDBY, "--run", run)
        for site in SITES:
            self.start_site(site, group=self.processes[SERVER].pid if site == LOST_SITE else 0)

    async def run(self, screen: Live) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_notes)
            await self.conduct(screen, self.act)
            nursery.cancel_scope.cancel()

    async def act(self) -> bool:
        if not self.story.kills and self.story.progress >= KILL_AT:
            self._lose_site()
        elif self.story.kills and LOST_SITE not in self.processes and self.story.progress >= RETURN_AT:
            self._bring_back_site()
        return LOST_SITE in self.processes and self.have_ended(*SITES) and self._are_level()

    def _lose_site(self) -> None:
        """Nobody of the site is waited for before all have been struck."""
        self.story.killed(f"all of {LOST_SITE}")
        self.strike(SERVER)
        self._cluster.strike(LOST_MEMBER)
        self.await_end(SERVER, LOST_SITE)
        self._cluster.await_end(LOST_MEMBER)

    def _bring_back_site(self) -> None:
        """What was not confirmed is counted before the old server cuts it off."""
        self.tail = unconfirmed(self.config)
        self.returned = self.story.seconds
        self._cluster.start(LOST_MEMBER)
        self.start(SERVER, "standby", "--name", SERVER, "--run", str(self.config.path))
        self.start_site(LOST_SITE, group=self.processes[SERVER].pid)

    def _are_level(self) -> bool:
        """As the serving one hears it from the other."""
        newest = self.story.newest
        return newest["state"] == "finished" and [standby["lag"] for standby in newest["standbys"]] == [0]

    async def _watch_notes(self) -> None:
        paths = [self.config.worker_directory(worker) / ACKNOWLEDGED for _, worker in self.config.workers()]
        read = dict.fromkeys(paths, 0)
        while True:
            for path in paths:
                if path.exists() and path.stat().st_size > read[path]:
                    whole = path.read_bytes()[read[path] :].rpartition(b"\n")[0]
                    for line in whole.splitlines():
                        seq = json.loads(line)["seq"]
                        self.notes.append(Note(seconds=self.story.seconds, worker=path.parent.name, seq=seq))
                    read[path] += len(whole) + (len(whole) > 0)
            await trio.sleep(NOTE_LOOK_SECONDS)


def unconfirmed(config: RunConfig) -> int:
    """How many records the old server's log holds in the place of which the new server's log has others."""
    began = next(entry.lsn for entry in read_log(config.node(STANDBY).log, config.run.name) if entry.term > 1)
    _, last = end_of(config.log)
    return max(0, last - began + 1)


def prepare(directory: Path, samples: int, etcd: list[str]) -> RunConfig:
    """A new run of three sites in `directory`."""
    text = template(
        run={"name": "byte-gpt", "samples": samples},
        sites={site: workers for site, (workers, _, _) in SITES.items()},
        server={
            "site": LOST_SITE,
            "keep_log": True,
            "address": free_address(),
            "durability": "replicated",
            # With one site gone there is no second standby: the new server tells the witness, and goes on by itself.
            "when_alone": "continue",
        },
        training=TRAINING,
        standbys={STANDBY: {"site": STANDBY, "address": free_address()}},
        witness={"etcd": etcd, "lease_seconds": LEASE_SECONDS},
    )
    return roster.initialize(directory, text)


def takeover_seconds(conductor: SiteLoss) -> float:
    """From the kill to the first note of an acknowledgement that only the new server can have given.

    Its log tells which: a delta that was admitted in its term. One that the old server had admitted does not count.
    """
    entries = read_log(conductor.config.node(STANDBY).log, conductor.config.run.name)
    records = (entry.record for entry in entries if entry.term > 1)
    admitted = {(record.worker, record.seq) for record in records if isinstance(record, Delta)}
    [(killed, _)] = conductor.story.kills
    return min(note.seconds for note in conductor.notes if (note.worker, note.seq) in admitted) - killed


def figures(conductor: SiteLoss, new: Verdict, old: Verdict, model: Path) -> dict[str, Any]:
    """The report's figures; its keys are what other programs may read. `new`: of the new server's log."""
    story = conductor.story
    is_level = (new.state.lsn, new.state.digest(), new.model_hash) == (
        old.state.lsn,
        old.state.digest(),
        old.model_hash,
    )
    return {
        "acknowledged": new.acknowledged,
        "acknowledged_lost": len(new.lost),
        "takeover_seconds": round(takeover_seconds(conductor), 2),
        "samples_trained": new.samples,
        "samples_counted_twice": new.samples_twice,
        "verify": "ok" if new.is_ok and old.is_ok else "failed",
        "state_hash": new.state.digest().hex(),
        **losses(model),
        "term": new.state.term,
        "server": new.state.server,
        "records_cut": conductor.tail,
        "old_server_level": is_level,
        "seconds": round(story.seconds, 1),
        "kills": told_kills(story),
        "returned_seconds": round(conductor.returned, 1),
    }


def rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    [kill] = report["kills"]
    level = "level at the end, to the bit" if report["old_server_level"] else "NOT level at the end"
    cut = f"{report['records_cut']} records that were never confirmed"
    return [
        ("killed", f"{kill['who']} at {kill['seconds']:.0f} s"),
        ("first acknowledgement by the new server", f"[bold]{report['takeover_seconds']:.1f} s[/] later"),
        ("acknowledged deltas lost", f"[bold]{report['acknowledged_lost']}[/] of {report['acknowledged']}"),
        ("samples counted twice", f"{report['samples_counted_twice']} of {report['samples_trained']}"),
        ("state hash verified", f"{report['verify']}, {report['state_hash']}"),
        ("the old server", f"back at {report['returned_seconds']:.0f} s as a standby; cut {cut}; {level}"),
    ]


def main() -> None:
    given = options(__doc__, directory="runs/failover", samples=60_000)
    with errors_in_one_line():
        require_etcd()
        clear(given.directory)
        with LocalCluster(given.directory / "etcd") as cluster:
            lose_a_site(prepare(given.directory, given.samples, cluster.urls), cluster, given.device)


def lose_a_site(config: RunConfig, cluster: LocalCluster, device: str) -> None:
    console = Console()
    console.print(f"run in {config.directory}; what each process says is in its logs/", soft_wrap=True)
    conductor = SiteLoss(config, cluster, device)
    try:
        conductor.start_all()
        with Live(console=console, auto_refresh=False) as screen:
            trio.run(conductor.run, screen)
        conductor.stop(SERVER)  # before the one that it follows: it is not to take over
    finally:
        conductor.stop()
    finish(conductor, console)


def finish(conductor: SiteLoss, console: Console) -> None:
    config, story = conductor.config, conductor.story
    paths = outputs(config)
    looking.export(config, paths["model"])
    new = looking.verify_directory(config.node(STANDBY).log, lambda _: None)
    old = looking.verify_directory(config.log, lambda _: None)
    report = figures(conductor, new, old, paths["model"])
    paths["report"].write_text(json.dumps(report, indent=2) + "\n")
    write_report(config.path, paths["page"])
    [(killed, who)] = story.kills
    marks = [
        (killed, f"{who} killed"),
        (killed + report["takeover_seconds"], f"{STANDBY} has taken over"),
        (conductor.returned, f"{LOST_SITE} is back"),
    ]
    draw_loss(curve(report, story), marks, paths["loss picture"], title="one model, three sites, the server's one lost")
    show(rows(report), report, paths, console)
    end(report, PROMISES)


if __name__ == "__main__":
    main()
