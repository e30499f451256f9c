"""An HTTP server before another one, which passes questions on, or does what a test wants to them and their answers."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx2
import trio

PIECE_BYTES = 64 * 1024
SLOW_SECONDS = 0.02


@dataclass(slots=True)
class Exchange:
    """One question, which the server behind has not seen yet."""

    path: str
    body: bytes
    stream: trio.SocketStream
    target: str
    client: httpx2.AsyncClient

    async def forward(self) -> tuple[int, bytes]:
        response = await self.client.post(self.target + self.path, content=self.body)
        return response.status_code, response.content

    async def answer(self, status: int, body: bytes, promised_bytes: int | None = None) -> None:
        length = len(body) if promised_bytes is None else promised_bytes
        head = f"HTTP/1.1 {status} Said\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
        await self.stream.send_all(head.encode() + body)


Treatment = Callable[[Exchange], Awaitable[None]]


async def passed_on(exchange: Exchange) -> None:
    await exchange.answer(*await exchange.forward())


def answered(status: int, body: bytes) -> Treatment:
    async def treatment(exchange: Exchange) -> None:
        await exchange.answer(status, body)

    return treatment


async def unanswered(exchange: Exchange) -> None:
    await trio.sleep_forever()


async def slowly(exchange: Exchange) -> None:
    """The right answer, but not within any time."""
    status, body = await exchange.forward()
    await exchange.answer(status, b"", promised_bytes=100_000)
    for _ in range(100_000 - len(body)):
        await exchange.stream.send_all(b" ")
        await trio.sleep(SLOW_SECONDS)
    await exchange.stream.send_all(body)


async def torn(exchange: Exchange) -> None:
    """It happens, and the connection ends in the middle of the answer."""
    status, body = await exchange.forward()
    await exchange.answer(status, body[:-5], promised_bytes=len(body))


async def reset(exchange: Exchange) -> None:
    """It happens, and nothing is said."""
    await exchange.forward()


async def endless(exchange: Exchange) -> None:
    await exchange.answer(200, b"", promised_bytes=1 << 40)
    while True:
        await exchange.stream.send_all(bytes(PIECE_BYTES))


@dataclass(slots=True)
class Held:
    """Questions wait at the door until they are let in, when whoever asked may be gone."""

    let_in: trio.Event = field(default_factory=trio.Event)
    answers: list[tuple[int, bytes]] = field(default_factory=list)
    answered: trio.Event = field(default_factory=trio.Event)

    async def __call__(self, exchange: Exchange) -> None:
        await self.let_in.wait()
        self.answers.append(await exchange.forward())
        self.answered.set()


class Front:
    def __init__(self, target: str, client: httpx2.AsyncClient) -> None:
        self.target = target
        self._client = client
        self.url = ""
        self.treatment: Treatment = passed_on
        self.paths: list[str] = []

    def treat_writes(self, treatment: Treatment) -> None:
        """Only transactions that put something; all else passes."""

        async def chosen(exchange: Exchange) -> None:
            await (treatment if b"request_put" in exchange.body else passed_on)(exchange)

        self.treatment = chosen

    async def serve(self, stream: trio.SocketStream) -> None:
        """One question a connection; whoever asks may leave at any time."""
        try:
            async with stream:
                exchange = await self._exchange(stream)
                self.paths.append(exchange.path)
                await self.treatment(exchange)
        except (trio.BrokenResourceError, EOFError):
            return

    async def _exchange(self, stream: trio.SocketStream) -> Exchange:
        read = b""
        while b"\r\n\r\n" not in read:
            read += await _more(stream)
        head, body = read.split(b"\r\n\r\n", 1)
        first, *lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        while len(body) < int(headers["content-length"]):
            body += await _more(stream)
        return Exchange(first.split()[1], body, stream, self.target, self._client)


async def _more(stream: trio.SocketStream) -> bytes:
    if not (piece := await stream.receive_some(PIECE_BYTES)):
        raise EOFError
    return bytes(piece)


@asynccontextmanager
async def open_front(target: str) -> AsyncIterator[Front]:
    async with httpx2.AsyncClient(trust_env=False) as client, trio.open_nursery() as nursery:
        front = Front(target, client)
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        front.url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
        nursery.start_soon(trio.serve_listeners, front.serve, [listener])
        yield front
        nursery.cancel_scope.cancel()
