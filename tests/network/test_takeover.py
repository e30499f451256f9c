"""Cuts between server, standby and witness: whatever is cut, at most one acknowledges, and nothing is lost.

The judge at the end is the harness': every acknowledgement that any server ever sent is in the one log that the run
ends with, at the place it named. So a server that acknowledged what its successor does not have is found out.
"""

import itertools
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from e2e.lives import PROMISED
from network.sites import Sites, why_not
from network.spread import LEASE_SECONDS, SpreadRun
from network.witness import Members, why_no_witness

from hetero_async.core.records import Joined
from hetero_async.core.reign import Sighting
from hetero_async.errors import EXIT_DEPOSED
from hetero_async.shell.segments import read_log

pytestmark = pytest.mark.skipif(bool(reason := why_not() or why_no_witness()), reason=reason)

ETCD = ("etcd-a", "etcd-b", "etcd-c")
MORE_DELTAS = 3
STEP_SECONDS = 0.02


class Cluster:
    """The server at a, its standby at b, and a member of etcd beside each, the third beside c.

    Workers train when a test lets them and no longer, so that however slow the machine and however long something else
    is waited for, the run is not over before it.
    """

    def __init__(self, sites: Sites, run: SpreadRun, members: Members) -> None:
        self.sites, self.run, self.members = sites, run, members
        self.server = run.start_server()
        self.standby = run.start_standby("b")
        self.hold(*run.names)
        self.training = [
            run.start_worker(worker, awaited=run.names, step_seconds=STEP_SECONDS, hold=str(self._hold(worker)))
            for worker in run.names
        ]

    def _hold(self, worker: str) -> Path:
        return self.run.config.directory / f"hold-{worker}"

    def hold(self, *workers: str) -> None:
        for worker in workers:
            self._hold(worker).touch()

    def let_go(self, *workers: str) -> None:
        for worker in workers:
            self._hold(worker).unlink(missing_ok=True)

    def apart(self, ones: Sequence[str], others: Sequence[str], is_cut: bool = True) -> None:
        for one, other in itertools.product(ones, others):
            self.sites.between(one, other, is_cut=is_cut)

    def sighting(self) -> Sighting:
        return self.members.sighting("etcd-c", self.run.config.run.name, LEASE_SECONDS)

    def await_reign(self, *reign: int | str) -> None:
        self.run.wait(lambda: reign_of(self.sighting()) == reign, f"the witness knows the reign {reign}")

    def await_promises(self, *workers: str) -> None:
        """Each of these workers goes on, is acknowledged more deltas than it had been, and is held."""
        goals = {worker: len(promises(self.run, worker)) + MORE_DELTAS for worker in workers}
        self.let_go(*workers)

        def are_answered() -> bool:
            answered = [worker for worker, goal in goals.items() if len(promises(self.run, worker)) >= goal]
            self.hold(*answered)
            return len(answered) == len(goals)

        self.run.wait(are_answered, f"each of {workers} is acknowledged more")


@contextmanager
def cluster(directory: Path, **options: Any) -> Iterator[Cluster]:
    with (
        Sites("a", "b", "c", *ETCD) as sites,
        Members(sites, directory / "etcd", ETCD) as members,
        SpreadRun(sites, directory / "run", standbys=["b"], etcd=members.urls, **options) as run,
    ):
        yield Cluster(sites, run, members)


def replicated(when_alone: str) -> dict[str, str]:
    return {"durability": "replicated", "when_alone": when_alone}


def test_17_10_a_server_cut_off_with_half_of_the_workers_cannot_acknowledge_and_comes_back_as_a_standby(
    tmp_path: Path,
) -> None:
    # It still reaches a-0 and c-0, but neither its standby nor a majority of the witness.
    workers, server = {"a": 1, "b": 2, "c": 1}, replicated("continue")
    with cluster(tmp_path, workers=workers, samples=6000, server=server) as here:
        run = here.run
        here.await_reign(1, "server", "b")
        here.await_promises(*run.names)
        here.apart(("a", "etcd-a"), ("b", "etcd-b", "etcd-c"))
        here.let_go(*run.names)
        run.wait(lambda: "takes over" in here.standby.said, "the standby takes over")
        here.await_promises("b-0", "b-1", "c-0")  # c-0 has moved over, while the old server is there and answers it
        here.sites.reset_connections("c")  # it dials the old one next
        here.await_promises("c-0")
        assert here.server.exit_code is None
        run.wait(lambda: last_lsn(run, "server") > took_over_at(run), "the old server has records that no other has")
        here.hold("a-0")
        here.server.kill()  # and now its site is lost
        here.apart(("a", "etcd-a"), ("b", "etcd-b", "etcd-c"), is_cut=False)
        back = run.start_standby("server")
        run.wait(lambda: " cut " in back.said, "its records that no other has are put aside")
        here.await_promises("a-0")
        here.await_reign(2, "b", "server")
        here.let_go(*run.names)
        assert run.finish(*here.training, here.standby, back).samples == 6000, "it serves last, in a run that is over"
        followed = [entry for entry in history(run, "server") if entry[1] <= 2]
        assert followed == history(run, "b")[: len(followed)], "the history that it took over from b is b's"
        assert {joined.worker for joined in run.records(Joined, "b")} == set(run.names)


def test_13_14_15_16_cuts_between_server_standby_and_witness_pause_what_they_must_and_promote_nobody(
    tmp_path: Path,
) -> None:
    with cluster(tmp_path, workers={"a": 1, "c": 1}, samples=6000, server=replicated("wait")) as here:
        run, sites = here.run, here.sites
        here.await_reign(1, "server", "b")
        here.await_promises(*run.names)
        for ways in ([("a", "b"), ("b", "a")], [("a", "b")], [("b", "a")]):
            for way in ways:
                sites.change(*way, is_cut=True)
            here.let_go(*run.names)
            run.wait(lambda: "no standby is in reach" in run.status()["state"], f"the server misses it: {ways}")
            paused = promises(run)
            run.wait(lambda: all(run.unanswered(worker) for worker in run.names), "deltas wait")
            assert promises(run) == paused, "nothing is acknowledged that one site alone has"
            assert reign_of(here.sighting()) == (1, "server", "b")
            for way in ways:
                sites.change(*way, is_cut=False)
            here.await_promises(*run.names)
        here.apart(("a",), ETCD)
        run.wait(lambda: here.sighting().holder == "", "the server's lease has run out")
        here.await_promises(*run.names)
        assert reign_of(here.sighting()) == (1, "server", "b"), "nobody was promoted"
        here.apart(("a",), ETCD, is_cut=False)
        run.wait(lambda: here.sighting().holder == "server", "the server holds its lease again")
        assert "takes over" not in here.standby.said
        # When all is over and the server gone, it takes its place.
        here.let_go(*run.names)
        assert run.finish(node="b").samples == 6000


def test_06_a_frozen_server_is_taken_over_from_and_thawed_it_stops_and_says_why(tmp_path: Path) -> None:
    workers, server = {"a": 1, "b": 1, "c": 1}, replicated("continue")
    with cluster(tmp_path, workers=workers, samples=3000, server=server) as here:
        run = here.run
        here.await_reign(1, "server", "b")
        here.await_promises(*run.names)
        here.server.signal(signal.SIGSTOP)
        here.let_go(*run.names)
        run.wait(lambda: "takes over" in here.standby.said, "the standby takes over")
        here.await_promises(*run.names)
        here.server.signal(signal.SIGCONT)
        assert here.server.ending() == EXIT_DEPOSED
        assert "b has taken over, in term 2: this server stops; start it again as a standby" in here.server.said
        here.let_go(*run.names)
        assert run.finish(*here.training, here.standby, node="b").samples == 3000


# --- looking ---


def reign_of(sighting: Sighting) -> tuple[int, str, str] | None:
    reign = sighting.reign
    return reign and (reign.term, reign.server, reign.partner)


def promises(run: SpreadRun, worker: str = "") -> list[str]:
    """What any server has acknowledged, to all or to one."""
    noted = run.config.directory / PROMISED
    lines = noted.read_text().splitlines() if noted.exists() else []
    return [line for line in lines if worker in ("", line.split()[0])]


def history(run: SpreadRun, node: str) -> list[tuple[int, int, object]]:
    return [(entry.lsn, entry.term, entry.record) for entry in read_log(run.config.node(node).log, None)]


def last_lsn(run: SpreadRun, node: str) -> int:
    return history(run, node)[-1][0]


def took_over_at(run: SpreadRun) -> int:
    return next(lsn for lsn, term, _ in history(run, "b") if term == 2)
