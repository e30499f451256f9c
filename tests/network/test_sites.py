"""The sites themselves: what is ordered to befall a way does so, in that direction only, and ends when it is told to.

A row of the fault catalogue that is tested over a network without the fault would prove nothing.
"""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from network.rough import Rough
from network.sites import Sites, why_not

pytestmark = pytest.mark.skipif(bool(reason := why_not()), reason=reason)

PORT = 5000
PATIENCE_SECONDS = 0.4


@pytest.fixture(scope="module")
def sites() -> Iterator[Sites]:
    with Sites("a", "b", "c") as sites:
        yield sites


def socket_at(sites: Sites, name: str) -> socket.socket:
    def opened() -> socket.socket:
        opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        opened.bind((sites.address(name), PORT))
        opened.settimeout(PATIENCE_SECONDS)
        return opened

    return sites.inside(name, opened)


def reaches(sites: Sites, source: str, target: str, payload_bytes: int = 4) -> bool:
    """Whether one datagram comes through."""
    with socket_at(sites, source) as sender, socket_at(sites, target) as receiver:
        sender.sendto(bytes(payload_bytes), (sites.address(target), PORT))
        try:
            return len(receiver.recv(65_535)) == payload_bytes
        except TimeoutError:
            return False


@contextmanager
def connected(sites: Sites, source: str, target: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection's two ends."""
    address = sites.address(target), PORT
    with (
        sites.inside(target, lambda: socket.create_server(address)) as server,
        sites.inside(source, lambda: socket.create_connection(address, 10)) as near,
    ):
        far, _ = server.accept()
        with far:
            yield near, far


def test_every_site_reaches_every_other_by_its_address_and_nobody_else_does(sites: Sites) -> None:
    assert all(reaches(sites, source, target) for source in "abc" for target in "abc" if source != target)
    with socket.socket() as outside:
        outside.settimeout(PATIENCE_SECONDS)
        with pytest.raises(OSError):
            outside.bind((sites.address("a"), PORT))


def test_a_way_is_cut_in_one_direction_and_between_two_sites_only(sites: Sites) -> None:
    sites.change("a", "b", is_cut=True)
    assert [reaches(sites, *way) for way in ("ab", "ba", "ac", "cb")] == [False, True, True, True]
    sites.change("a", "b", is_cut=False)
    assert reaches(sites, "a", "b")


def test_a_site_that_is_cut_off_is_so_from_all_others_and_back(sites: Sites) -> None:
    sites.cut("c")
    assert [reaches(sites, *way) for way in ("ac", "ca", "bc", "cb", "ab")] == [False, False, False, False, True]
    sites.cut("c", False)
    assert all(reaches(sites, *way) for way in ("ac", "ca", "bc", "cb"))


def test_large_packets_vanish_and_small_ones_pass(sites: Sites) -> None:
    sites.change("a", "b", packet_bytes_max=511)
    headers = 28  # IP and UDP
    assert [reaches(sites, "a", "b", size - headers) for size in (511, 512, 1500)] == [True, False, False]
    assert reaches(sites, "b", "a", 1400)
    sites.change("a", "b", packet_bytes_max=0)
    assert reaches(sites, "a", "b", 1400)


def test_a_rough_way_loses_doubles_delays_and_reorders(sites: Sites) -> None:
    sites.change("a", "b", rough=Rough(delay_ms=50, jitter_ms=10, loss=0.2, duplicate=0.2, reorder=0.2))
    with socket_at(sites, "a") as sender, socket_at(sites, "b") as receiver:
        start = time.monotonic()
        for number in range(200):
            sender.sendto(number.to_bytes(2, "big"), (sites.address("b"), PORT))
        came, times = [], []
        try:
            while True:
                came.append(int.from_bytes(receiver.recv(2), "big"))
                times.append(time.monotonic() - start)
        except TimeoutError:
            pass
    assert 100 < len(set(came)) < 200, "some are lost, most are not"
    assert len(came) > len(set(came)), "some came twice"
    assert came != sorted(came), "some came before others"
    assert max(times) > 0.05, "most were under way for long"
    assert reaches(sites, "b", "a"), "the other direction is as it was"
    sites.change("a", "b", is_cut=True)
    assert not reaches(sites, "a", "b")
    sites.change("a", "b", is_cut=False, rough=None)
    assert reaches(sites, "a", "b")


def test_a_thin_way_lets_no_more_through_than_it_holds(sites: Sites) -> None:
    sites.change("a", "b", megabits_per_second=8)
    with connected(sites, "a", "b") as (near, far):
        start, began = sites.bytes_carried("a", "b"), time.monotonic()
        threading.Thread(target=near.sendall, args=(bytes(1_000_000),), daemon=True).start()
        left = 1_000_000
        while left:
            left -= len(far.recv(65_536))
        assert time.monotonic() - began > 0.5, "a megabyte a second, and what the queue let through at once"
        assert sites.bytes_carried("a", "b") - start > 1_000_000
    sites.change("a", "b", megabits_per_second=0)


def test_a_reset_ends_connections_at_both_ends(sites: Sites) -> None:
    with connected(sites, "a", "b") as (near, far):
        assert (len(sites.connections("a", "b")), len(sites.connections("b", "a"))) == (1, 1)
        sites.reset_connections("a")
        with pytest.raises(ConnectionResetError):
            far.recv(1)
        with pytest.raises(OSError):
            near.recv(1)


def test_a_site_has_a_namespace_for_as_long_as_it_is_held() -> None:
    with Sites("alone") as sites:
        namespace = sites.namespace("alone")
        assert sites.inside("alone", lambda: socket.if_nameindex()[-1][1]) == "eth0"
    assert not os.path.exists(namespace)
