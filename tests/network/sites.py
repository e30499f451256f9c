"""Sites as network namespaces on a bridge, each with an address of its own, and what may befall the ways between them.

Nothing here has a name in the file system or touches the machine's own network: a namespace lives as long as this
process holds it open, and is gone with it, however it ends. What happens to packets happens on the bridge's ports, by
source and destination, as in a network between the sites: their hosts see late and missing packets and no more.
"""

import ctypes
import functools
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, TypeVar

from network.rough import Rough, RoughLink, open_tun

T = TypeVar("T")

CLONE_NEWNET = 0x40000000
TOOLS = ("ip", "tc", "ss", "nsenter")
COMMAND_SECONDS = 30.0
NETWORK = "10.77.0"
# Each port has a class for every other site, numbered as the sites are, and one that nothing befalls.
OPEN_CLASS = "ffff"
OPEN_RATE = "10gbit"
# What waits before a way: a tenth of a second, as in a router that is set for its link, and some packets at the least.
QUEUE_BYTES, QUEUE_BYTES_MIN, QUEUE_SECONDS = 256_000, 32_000, 0.1

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """What befalls the packets from one site to another, in this direction only."""

    is_cut: bool = False
    megabits_per_second: float = 0.0  # 0: as fast as this machine
    packet_bytes_max: int = 0  # larger ones vanish without a word: a power of two less one, or 0 for no such limit
    rough: Rough | None = None


class Sites:
    """So many sites, by name. Leaving it ends the namespaces and whatever was still on its way in them."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self._numbers = {name: number for number, name in enumerate(names, 1)}
        self._ways = {(source, target): Way() for source in names for target in names if source != target}
        self._links: dict[frozenset[str], RoughLink] = {}
        self._namespaces: dict[str, int] = {}

    def __enter__(self) -> "Sites":
        try:
            self._namespaces = {name: _new_namespace() for name in ("", *self.names)}  # "": where the bridge is
            self._do("", "ip", "link add hub type bridge", "link set hub up")
            for name in self.names:
                self._plug(name)
            self._has_netem = has_netem()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for link in self._links.values():
            link.close()
        for descriptor in self._namespaces.values():
            os.close(descriptor)

    def _plug(self, name: str) -> None:
        """Lay the site's cable to a port of the bridge."""
        port, others = self._port(name), [other for other in self.names if other != name]
        self._do(
            "",
            "ip",
            f"link add {port} type veth peer name eth0 netns {self.namespace(name)}",
            f"link set {port} master hub up",
        )
        self._do(name, "ip", "link set lo up", f"addr add {self.address(name)}/24 dev eth0", "link set eth0 up")
        at_port = f"dev {port} parent 1:"
        self._do("", "tc", f"qdisc add dev {port} root handle 1: htb")
        for number in (OPEN_CLASS, *map(self._class, others)):
            self._do("", "tc", f"class add {at_port} classid 1:{number} htb rate {OPEN_RATE} quantum 60000")
        for other in others:
            number = self._class(other)
            self._do("", "tc", f"filter add {at_port} protocol ip prio 9{number} {self._from(other)} flowid 1:{number}")

    # --- being there ---

    def address(self, name: str) -> str:
        return f"{NETWORK}.{self._numbers[name]}"

    def namespace(self, name: str) -> str:
        """A path for `enter`, good in every process while this one lives."""
        return f"/proc/{os.getpid()}/fd/{self._namespaces[name]}"

    def command(self, name: str, *words: str) -> list[str]:
        """The command line that runs these words in the site."""
        return ["nsenter", f"--net={self.namespace(name)}", "--", *words]

    def inside(self, name: str, call: Callable[[], T]) -> T:
        """What the call comes to in the site; it runs in a thread of its own."""
        return _in_thread(lambda: (enter(self.namespace(name)), call())[1])

    def connections(self, name: str, other: str) -> list[str]:
        """The TCP connections with the other site that the site's host believes in, one line each."""
        return _run(self.command(name, "ss", "-tnH", "state", "established", "dst", self.address(other))).splitlines()

    def bytes_carried(self, source: str, target: str) -> int:
        """What has come through so far by the bridge, headers and repeated packets included."""
        shown = _run(self.command("", "tc", "-s", "class", "show", "dev", self._port(target)))
        [own] = [part for part in shown.split("class htb ") if part.startswith(f"1:{self._class(source)} ")]
        return int(own.split("Sent ")[1].split()[0])

    # --- what befalls them ---

    def cut(self, name: str, is_cut: bool = True) -> None:
        """Nothing reaches the site and nothing leaves it, until it is not cut any more."""
        for other in self.names:
            if other != name:
                self.between(name, other, is_cut=is_cut)

    def between(self, one: str, other: str, **changes: Any) -> None:
        """Change the ways of both directions."""
        self.change(one, other, **changes)
        self.change(other, one, **changes)

    def change(self, source: str, target: str, **changes: Any) -> None:
        """Change what is named here of one Way, and leave the rest of it and every other one as they are."""
        old, way = self._ways[source, target], replace(self._ways[source, target], **changes)
        self._ways[source, target] = way
        rate = f"{way.megabits_per_second:g}mbit" if way.megabits_per_second else OPEN_RATE
        at_port, number = f"dev {self._port(target)} parent 1:", self._class(source)
        small = f"{at_port} protocol ip prio {number}"
        if old.packet_bytes_max:
            self._do("", "tc", f"filter del {small}")
        if way.packet_bytes_max:
            no_bit_above = f"match u16 0 {0xFFFF & ~way.packet_bytes_max:#x} at 2"
            self._do("", "tc", f"filter add {small} {self._from(source)} {no_bit_above} flowid 1:{OPEN_CLASS}")
        self._do(
            "",
            "tc",
            f"class change {at_port} classid 1:{number} htb rate {rate} quantum 60000",
            f"qdisc replace {at_port}{number} {self._queue(way)}",
        )
        is_aside = [each.rough is not None and not each.is_cut and not self._has_netem for each in (old, way)]
        if way.rough and is_aside[1]:
            self._link(source, target).set(source, way.rough)
            shape = f"tbf rate {rate} burst 32kb limit 256kb" if way.megabits_per_second else "pfifo"
            self._do(source, "tc", f"qdisc replace dev {self._tun(target)} root {shape}")
        if is_aside[0] != is_aside[1]:
            route = f"{self.address(target)} dev {self._tun(target)} src {self.address(source)}"
            self._do(source, "ip", f"route {'add' if is_aside[1] else 'del'} {route}")

    def reset_connections(self, name: str) -> None:
        """End every TCP connection of the site with a RST, for its own processes and for those at the other end."""
        assert _run(self.command(name, "ss", "-KtnH", "state", "established")), f"{name} has no connection"

    def _queue(self, way: Way) -> str:
        if way.is_cut or way.packet_bytes_max:  # what is small enough has been let through before
            return "blackhole"
        if way.rough and self._has_netem:
            return way.rough.netem()
        tenth = int(QUEUE_SECONDS * way.megabits_per_second * 1e6 / 8)
        return f"bfifo limit {max(QUEUE_BYTES_MIN, tenth) if tenth else QUEUE_BYTES}"

    def _link(self, one: str, other: str) -> RoughLink:
        pair = frozenset((one, other))
        if pair not in self._links:
            ends = {end: self._open_tun(end, self._tun(target)) for end, target in ((one, other), (other, one))}
            self._links[pair] = RoughLink(ends)
        return self._links[pair]

    def _open_tun(self, name: str, device: str) -> int:
        descriptor = self.inside(name, lambda: open_tun(device))
        self._do(name, "ip", f"link set {device} up")
        return descriptor

    # --- small ---

    def _class(self, name: str) -> str:
        return str(self._numbers[name])

    def _port(self, name: str) -> str:
        return f"port{self._numbers[name]}"

    def _tun(self, target: str) -> str:
        return f"tun{self._numbers[target]}"

    def _from(self, source: str) -> str:
        return f"u32 match ip src {self.address(source)}"

    def _do(self, name: str, tool: str, *lines: str) -> None:
        """Lines for `ip` or `tc`, in the namespace."""
        _run(self.command(name, tool, "-batch", "-"), "\n".join(lines))


def enter(namespace: str) -> None:
    """From here on the calling thread, and every thread it starts, is in that network namespace."""
    descriptor = os.open(namespace, os.O_RDONLY)
    try:
        if _libc.setns(descriptor, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(descriptor)


@functools.cache
def why_not() -> str:
    """Why this machine can have no sites; "" when it can."""
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if os.geteuid() != 0:
        return "network namespaces need root"
    if absent:
        return f"network namespaces need {', '.join(absent)} (iproute2, util-linux)"
    try:
        with Sites("one", "other") as sites:
            sites.between("one", "other", rough=Rough(delay_ms=1))
    except (OSError, AssertionError) as error:
        return f"no sites on this machine: {error}"
    return ""


def has_netem() -> bool:
    asked = ["unshare", "--net", "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
    return subprocess.run(asked, capture_output=True, timeout=COMMAND_SECONDS).returncode == 0


def _new_namespace() -> int:
    """A descriptor that keeps it alive."""

    def unshare() -> int:
        if _libc.unshare(CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"no network namespace: {os.strerror(ctypes.get_errno())}")
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY)

    return _in_thread(unshare)


def _in_thread(call: Callable[[], T]) -> T:
    """In a thread that ends with it, so that no other is in the wrong namespace afterwards."""
    answers: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(call())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    for failure in failures:
        raise failure
    return answers[0]


def _run(words: Sequence[str], told: str = "") -> str:
    done = subprocess.run(words, input=told, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr.strip()}\n{told}"
    return done.stdout
