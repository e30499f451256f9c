"""What lies beyond this host: the other nodes, how far and how fast they are, witness and archive."""

import contextlib
import errno
import socket
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import trio

from hetero_async.asking import endpoints
from hetero_async.config import Node, RunConfig
from hetero_async.doctor.findings import Finding, failed, ok, warning
from hetero_async.errors import ArchiveAway, ConfigError
from hetero_async.formats.status import unpack_status
from hetero_async.shell.admin import NotServing, ask
from hetero_async.shell.archive import open_archive
from hetero_async.shell.dial import Endpoint, open_dial_link
from hetero_async.shell.handshake import SILENT
from hetero_async.shell.sounding import ask_members, ask_status, pull_rate
from hetero_async.shell.telemetry import NullObserver
from hetero_async.shell.threads import in_thread

REACH_SECONDS = 6.0
ROUND_TRIPS = 7
PULL_SECONDS = 3.0
MAJORITY = 0.5
# From there on a few round trips more are a matter of seconds.
FAR_SECONDS = 0.05
TCP = Path("/proc/sys/net/ipv4")


async def running(nodes: list[Node]) -> dict[str, str]:
    """Those of this host that answer their operator, and what they say."""
    states: dict[str, str] = {}
    for node in nodes:
        with contextlib.suppress(NotServing):
            states[node.name] = (await ask(node.admin, "status"))["state"]
    return states


def ports(node: Node, states: dict[str, str]) -> Iterator[Finding]:
    """Of a node of this host: held by it, or free for it."""
    if node.name in states:
        yield ok(f"ports of {node.name}", f"held by it; it says: {states[node.name] or 'serving'}")
    else:
        yield from (_port(node.name, address) for address in (node.control, node.bulk))


def _port(name: str, address: str) -> Finding:
    subject = f"ports of {name}"
    parsed = urlsplit(address)
    try:
        family, kind, _, _, place = socket.getaddrinfo(parsed.hostname, parsed.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            told = "another process listens there: stop it, or change the address in run.toml"
        else:
            told = f"{error.strerror}: it must be an address of this machine; 0.0.0.0 where workers dial another"
        return failed(subject, f"{address}: {told}")
    return ok(subject, f"{address} is free")


async def link(config: RunConfig, endpoint: Endpoint, names: list[str]) -> AsyncIterator[Finding]:
    """One other node, with each key of this host that may ask. `names`: whose they are."""
    told: dict[str, Any] = {}
    subject = f"link to {endpoint.name}"
    for name in names:
        secret = config.keys / f"{name}.secret"
        try:
            async with open_dial_link([endpoint], secret_path=secret, observer=NullObserver()) as dialled:
                seconds: list[float] = []
                with trio.move_on_after(REACH_SECONDS):
                    for _ in range(ROUND_TRIPS if not told else 1):
                        payload, took = await ask_status(dialled)
                        seconds.append(took)
                problem = dialled.problem or (dialled.control.socket.problem if dialled.control.socket else "")
                if not seconds:
                    yield failed(
                        subject,
                        f"{endpoint.control} with the key of {name}: {problem or 'no answer'}; "
                        "is it running, is this its address, and is the key in its `hetero-async keys list`?",
                    )
                    continue
                bulk = dialled.bulk.socket.problem if dialled.bulk.socket else ""
                if bulk != SILENT:
                    yield failed(subject, f"{endpoint.bulk} (bulk): {bulk or 'no answer'}; open this port as well")
                if not told:
                    told = unpack_status(payload)
                    yield ok(
                        subject,
                        f"there and back in {1000 * median(seconds):.1f} ms (of {len(seconds)}), "
                        f"delay = {500 * median(seconds):.1f} ms in a plan; it says: {told['state']}",
                    )
                    for finding in begins_slowly(endpoint.name, median(seconds)):
                        yield finding
                else:
                    yield ok(subject, f"answers to the key of {name}")
        except ConfigError as error:
            yield failed(subject, str(error))
    workers = [name for _, name in config.workers() if name in names]
    if told and workers:
        yield await _rate(config, endpoint, workers, told)


def begins_slowly(name: str, round_trip_seconds: float, settings: Path = TCP) -> Iterator[Finding]:
    """Nothing where that node is near, or the kernel does not say. BBR paces itself, and has no such rest."""
    with contextlib.suppress(OSError):
        is_slow = (settings / "tcp_slow_start_after_idle").read_text().strip() == "1"
        if (
            is_slow
            and "bbr" not in (settings / "tcp_congestion_control").read_text()
            and round_trip_seconds >= FAR_SECONDS
        ):
            yield warning(
                f"TCP to {name}",
                "begins slowly after each rest, which costs each delta and publish some round trips more; "
                "on both hosts: sysctl -w net.ipv4.tcp_slow_start_after_idle=0",
            )


async def _rate(config: RunConfig, endpoint: Endpoint, workers: list[str], told: dict[str, Any]) -> Finding:
    """With the key of a worker that is not at work: another's would be taken from its own connection."""
    subject = f"rate from {endpoint.name}"
    at_work = [worker["worker"] for worker in told["workers"] if worker["alive"]]
    idle = next((worker for worker in workers if worker not in at_work), None)
    if idle is None:
        return ok(
            subject, "not measured: all workers of this host are at work and would be disturbed; status shows theirs"
        )
    if "standby" in told or not told["positions"]:
        why = "it stands by, and hands nothing out" if "standby" in told else "there is nothing to fetch from it yet"
        return ok(subject, f"not measured: {why}")
    secret = config.keys / f"{idle}.secret"
    async with open_dial_link([endpoint], secret_path=secret, observer=NullObserver()) as dialled:
        rate = None
        with trio.move_on_after(REACH_SECONDS + PULL_SECONDS):
            await ask_status(dialled)
            rate = await pull_rate(dialled, told["publish"], PULL_SECONDS)
    if rate is None:
        return warning(
            subject,
            "a snapshot of the parameters could not be fetched: try again, and see its log if that does not help",
        )
    least = "at least " if rate.is_least else ""
    found = f"{least}{8 * rate.per_second / 1e6:,.1f} Mbit/s ({rate.bytes_down / 1e6:.2f} MB in {rate.seconds:.2f} s)"
    return ok(subject, found)


def others(config: RunConfig, without: list[str]) -> Iterator[Endpoint | Finding]:
    """The nodes that can be asked."""
    try:
        yield from (endpoint for endpoint in endpoints(config) if endpoint.name not in without)
    except ConfigError as error:
        yield failed("link", f"{error}")


async def witness(config: RunConfig) -> AsyncIterator[Finding]:
    urls = config.witness.etcd
    if not urls:
        return
    answers = await ask_members(urls, config.run.name)
    heard = {url: answer for url, answer in answers.items() if not isinstance(answer, str)}
    for answer in answers.values():
        if isinstance(answer, str):
            yield warning("witness", f"{answer}; start it, or open the way to it")
    views = Counter(repr((answer.term, answer.values)) for answer in heard.values())
    agreeing = max(views.values(), default=0)
    told = f"{agreeing} of {len(urls)} members agree"
    if agreeing <= MAJORITY * len(urls):
        yield failed("witness", f"{told}, which is no majority: no server can begin to serve, no standby take over")
    else:
        yield ok("witness", told)


async def archive(config: RunConfig) -> AsyncIterator[Finding]:
    """Reached, and willing to take an object."""
    url = config.server.archive
    if not url:
        return
    try:
        store = open_archive(url, config.path.parent, REACH_SECONDS)
        found = await in_thread(store.list, config.run.name)
        yield ok(
            "archive",
            f"{url}: {len(found)} objects of this run, {sum(o.size_bytes for o in found.values()) / 1e9:.2f} GB",
        )
    except (ArchiveAway, ConfigError) as error:
        yield failed("archive", f"{error}; credentials and endpoint come from the environment of this very command")
