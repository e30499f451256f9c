"""Questions that measure: how each member of a witness answers, and how far away and how fast a server is.

Only `hetero-async doctor` asks them. They go over connections of their own and change nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import httpx2
import trio

from hetero_async.core.messages import SNAPSHOT, Chunk, StatusReport, StatusRequest
from hetero_async.errors import PeerError, WitnessAway
from hetero_async.ports import DialLink
from hetero_async.shell.etcd import EtcdMember, Reading
from hetero_async.shell.witness import reign_key
from hetero_async.transfers import Pull

MEMBER_SECONDS = 4.0
SEND_AGAIN_SECONDS = 0.02
# A snapshot that does not begin to come in this time does not come.
FIRST_CHUNK_SECONDS = 3.0


async def ask_members(urls: Sequence[str], run: str) -> dict[str, Reading | str]:
    """What each member, asked by itself, holds of the run's reign; or why it does not say. Linearizable."""
    answers: dict[str, Reading | str] = {}
    headers = {"accept-encoding": "identity"}

    async def ask(client: httpx2.AsyncClient, url: str) -> None:
        try:
            with trio.fail_after(MEMBER_SECONDS):
                answers[url] = await EtcdMember(url, client).read([reign_key(run)])
        except trio.TooSlowError:
            answers[url] = f"no answer within {MEMBER_SECONDS:g} s"
        except WitnessAway as error:
            answers[url] = str(error)

    async with httpx2.AsyncClient(timeout=None, trust_env=False, headers=headers) as client:
        async with trio.open_nursery() as nursery:
            for url in urls:
                nursery.start_soon(ask, client, url)
    return {url: answers[url] for url in urls}


async def ask_status(link: DialLink) -> tuple[bytes, float]:
    """A server's status, and the seconds from the question to the answer. Its caller's deadline ends the wait."""
    began = trio.current_time()
    while not await link.control.send(link.server.key, StatusRequest()):
        await trio.sleep(SEND_AGAIN_SECONDS)
        began = trio.current_time()
    while not isinstance((incoming := await link.control.receive()).message, StatusReport):
        pass
    return incoming.payload, trio.current_time() - began


@dataclass(frozen=True, slots=True)
class Rate:
    """`is_least`: it was all in one chunk, most of whose time may have been the way there and back."""

    bytes_down: int
    seconds: float
    is_least: bool

    @property
    def per_second(self) -> float:
        return self.bytes_down / self.seconds if self.seconds else math.inf


async def pull_rate(link: DialLink, publish: int, seconds: float) -> Rate | None:
    """How fast a snapshot comes, for so many seconds at most; None: it does not come.

    To be asked only with the key of a worker that is not at work: the server sends bulk to a key's newest connection.
    """
    pull = Pull(SNAPSHOT, publish, 0, 1 << 40)
    wants, asked, began, first, count = pull.wants(), trio.current_time(), 0.0, 0, 0
    with trio.move_on_after(FIRST_CHUNK_SECONDS) as patience:
        while not pull.is_complete:
            for want in wants:
                while not await link.bulk.send(link.server.key, want):  # noqa: ASYNC110, the caller's deadline ends it
                    await trio.sleep(SEND_AGAIN_SECONDS)
            incoming = await link.bulk.receive()
            if not isinstance(incoming.message, Chunk):
                return None  # it has none, or another kind of answer
            try:
                pull.add(incoming.message, incoming.payload, 0)
            except PeerError:
                return None
            if began:
                count += len(incoming.payload)
            else:  # the first says how large it is, and its way there and back is delay and no rate
                began, first = trio.current_time(), len(incoming.payload)
                patience.deadline = began + seconds
            wants = pull.wants()
    ended = trio.current_time()
    if count:
        return Rate(count, ended - began, is_least=False)
    return Rate(first, ended - asked, is_least=True) if began else None
