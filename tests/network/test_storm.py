"""So many workers that lose their server in one moment, and all come back to it at once."""

import signal
from pathlib import Path

import pytest
import trio
from e2e.harness import Life, Silent
from network.sites import Sites, why_not
from network.spread import SpreadRun

from hetero_async.asking import endpoints
from hetero_async.core.messages import Beat, Heartbeat, Rejoin
from hetero_async.shell.dial import DialLink, open_dial_link

pytestmark = pytest.mark.skipif(bool(reason := why_not()), reason=reason)

LINKS = 200
SERVED_SECONDS = 60.0
ASK_SECONDS = 0.5
GROWTH_BYTES_MAX = 64e6
HEARTBEAT = Heartbeat(
    incarnation=1, state="training", steps=0, steps_per_second=0.0, publish=0, bytes_up=0, bytes_down=0
)


def test_26_a_server_that_comes_back_serves_all_who_lost_it_at_once_and_does_not_grow_by_it(tmp_path: Path) -> None:
    workers = {"home": 1, "far": LINKS}
    with (
        Sites("home", "far") as sites,
        SpreadRun(sites, tmp_path / "run", workers=workers, samples=1200) as run,
    ):
        server = run.start_server(exit_when_finished=False)
        [first, *others] = run.names
        trained = run.start_worker(first, step_seconds=0.03)
        run.wait(lambda: run.deltas(first), "there is a run")
        storm = Storm(run, others)
        again = sites.inside("far", lambda: trio.run(storm.through, server))
        assert storm.served == [set(others), set(others)]
        assert storm.peak_bytes[1] < storm.peak_bytes[0] + GROWTH_BYTES_MAX
        assert run.finish(trained).samples == 1200
        again.signal(signal.SIGTERM)
        assert again.ending() == 0


class Storm:
    """Links with real keys, of which each asks until the server has decided on its word; before and after a kill."""

    def __init__(self, run: SpreadRun, workers: list[str]) -> None:
        self.run = run
        self.workers = workers
        self.served: list[set[str]] = []
        self.peak_bytes: list[int] = []  # of the server's memory

    async def through(self, server: Life) -> Life:
        """The server that is there afterwards."""
        links: dict[str, DialLink] = {}
        self.peak_bytes.append(peak_bytes(server.pid))
        async with trio.open_nursery() as nursery:
            for worker in self.workers:
                links[worker] = await nursery.start(self._open, worker)
            await self._all_served(links)
            server.signal(signal.SIGKILL)
            server.ending()
            with trio.fail_after(SERVED_SECONDS):
                while any(link.connected for link in links.values()):  # noqa: ASYNC110, no link tells of it
                    await trio.sleep(0.01)
            again = self.run.start_server(exit_when_finished=False)
            await self._all_served(links)
            self.peak_bytes.append(peak_bytes(again.pid))
            nursery.cancel_scope.cancel()
        return again

    async def _open(self, worker: str, task_status: "trio.TaskStatus[DialLink]" = trio.TASK_STATUS_IGNORED) -> None:
        secret = self.run.config.keys / f"{worker}.secret"
        async with open_dial_link(endpoints(self.run.config), secret_path=secret, observer=Silent()) as link:
            task_status.started(link)
            await trio.sleep_forever()

    async def _all_served(self, links: dict[str, DialLink]) -> None:
        served: set[str] = set()
        self.served.append(served)

        async def be_served(worker: str, link: DialLink) -> None:
            while worker not in served:
                await link.control.send(link.server.key, HEARTBEAT)
                with trio.move_on_after(ASK_SECONDS):
                    if isinstance((await link.control.receive()).message, Rejoin | Beat):
                        served.add(worker)

        with trio.fail_after(SERVED_SECONDS):
            async with trio.open_nursery() as nursery:
                for worker, link in links.items():
                    nursery.start_soon(be_served, worker, link)


def peak_bytes(pid: int) -> int:
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(line.split()[1])
