"""Five hosts, each a network namespace: on one bridge, or each behind a link of so many bits a second and far away.

Where the kernel has no netem a thread carries the packets of the far hosts, from each one's TUN device to the others'.
The uplink is shaped by the kernel's tbf; downlink and delay are the thread's.
"""

import contextlib
import heapq
import json
import os
import select
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping

from network.rough import PACKET_BYTES_MAX, open_tun
from network.sites import Sites
from places import Host

FAR_DEVICE = "wan"
PACKET_BYTES = 9000  # fewer packets to carry than with Ethernet's 1500
QUEUE_SECONDS = 0.1  # what a router keeps of a full link; more is lost
COMMAND_SECONDS = 30.0


@contextlib.contextmanager
def hosts_on(sites: Sites, megabits_per_second: float, delay_seconds: float) -> Iterator[dict[str, Host]]:
    """The sites as hosts. A rate of 0: as near and as fast as the bridge; a delay is one way."""
    hosts = {name: Host(name, sites.address(name)) for name in sites.names}
    if not megabits_per_second:
        yield hosts
        return
    tuns = {host.address: _move_away(sites, host, hosts, megabits_per_second) for host in hosts.values()}
    stop, stopping = os.pipe()
    carrier = threading.Thread(
        target=_carry, args=(tuns, stop, 8e-6 / megabits_per_second, delay_seconds), name="carrier", daemon=True
    )
    carrier.start()
    try:
        yield hosts
    finally:
        os.close(stopping)
        carrier.join()
        for descriptor in (stop, *tuns.values()):
            os.close(descriptor)


def bytes_sent(sites: Sites) -> int:
    """By all hosts to others so far, as their interfaces count."""
    shown = [_run(sites, name, "ip", "-json", "-stats", "link") for name in sites.names]
    links = [link for host in shown for link in json.loads(host) if link["ifname"] != "lo"]
    return sum(int(link["stats64"]["tx"]["bytes"]) for link in links)


def _move_away(sites: Sites, host: Host, hosts: Mapping[str, Host], megabits_per_second: float) -> int:
    """The descriptor of its TUN device, by which all its ways lead from now on."""
    descriptor = sites.inside(host.name, lambda: open_tun(FAR_DEVICE))
    lines = [f"link set {FAR_DEVICE} mtu {PACKET_BYTES} up"]
    others = [other.address for other in hosts.values() if other != host]
    lines += [f"route add {other} dev {FAR_DEVICE} src {host.address}" for other in others]
    _run(sites, host.name, "ip", "-batch", "-", typed="\n".join(lines))
    shape = f"tbf rate {megabits_per_second:g}mbit burst 64kb latency {1000 * QUEUE_SECONDS:g}ms"
    _run(sites, host.name, "tc", "qdisc", "add", "dev", FAR_DEVICE, "root", *shape.split())
    return descriptor


def _carry(tuns: Mapping[str, int], stop: int, seconds_per_byte: float, delay_seconds: float) -> None:
    poll = select.poll()
    for descriptor in (stop, *tuns.values()):
        poll.register(descriptor, select.POLLIN)
    free_at = dict.fromkeys(tuns, 0.0)  # each downlink
    under_way: list[tuple[float, int, int, bytes]] = []
    number = 0
    while True:
        wait_ms = max(0.0, under_way[0][0] - time.monotonic()) * 1000 if under_way else None
        for descriptor, _ in poll.poll(wait_ms):
            if descriptor == stop:
                return
            packet, now = os.read(descriptor, PACKET_BYTES_MAX), time.monotonic()
            target = socket.inet_ntoa(packet[16:20]) if packet[0] >> 4 == 4 else ""
            if target in tuns and free_at[target] < now + QUEUE_SECONDS:
                free_at[target] = max(now, free_at[target]) + len(packet) * seconds_per_byte
                number += 1
                heapq.heappush(under_way, (free_at[target] + delay_seconds, number, tuns[target], packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, out, packet = heapq.heappop(under_way)
            os.write(out, packet)


def _run(sites: Sites, name: str, *words: str, typed: str = "") -> str:
    done = subprocess.run(
        sites.command(name, *words), input=typed, capture_output=True, text=True, timeout=COMMAND_SECONDS
    )
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr.strip()}"
    return done.stdout
