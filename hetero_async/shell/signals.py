"""Ending when told to."""

import signal

import trio


async def stop_on_signal(scope: trio.CancelScope) -> None:
    """Cancel the scope when the process is told to end."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            scope.cancel()
            return
