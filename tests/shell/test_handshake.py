"""The socket that dials: it can be closed at any moment, whatever libzmq is about to tell of it."""

from contextlib import closing

import pytest
import trio
import trio.lowlevel
import zmq
from shell.place import Place, framed, heartbeat, run, serving

from hetero_async.shell import wire
from hetero_async.shell.keys import load_secret

# Enough to meet a monitor that was closed before its socket (libzmq's only thread then waits for good), or a monitor's
# address that is used again too soon.
DIALS = 300


def test_a_socket_that_is_closed_while_it_tries_leaves_all_others_alone(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "RETRY_MS_MIN", 1)
    secret, server_key = load_secret(place.keys / "a-0.secret"), place.public("server")

    async def main() -> None:
        with zmq.Context() as context:
            for _ in range(DIALS):
                with closing(
                    wire.dial(context, wire.CONTROL, place.control, server_key=server_key, secret=secret)
                ) as socket:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(socket.watch)
                        while not socket.problem:
                            await trio.lowlevel.checkpoint()
                        nursery.cancel_scope.cancel()
            async with serving(place) as (_, heard):
                with closing(
                    wire.dial(context, wire.CONTROL, place.control, server_key=server_key, secret=secret)
                ) as socket:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(socket.watch)
                        await socket.send([framed(heartbeat())])
                        await socket.receive()
                        nursery.cancel_scope.cancel()
                assert heard[0].message == heartbeat()

    run(main, 60)
