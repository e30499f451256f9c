"""What a key may say in a second, and at once."""

from collections.abc import Awaitable, Callable

import trio
import trio.testing

from hetero_async.shell.quota import BURST_SECONDS, Quota


def in_time(script: Callable[[], Awaitable[None]]) -> None:
    trio.run(script, clock=trio.testing.MockClock(autojump_threshold=0))


def taken(quota: Quota, key: bytes, size: int, tries: int) -> int:
    return sum(quota.take(key, size) for _ in range(tries))


def test_a_burst_is_allowed_and_then_the_rate() -> None:
    async def script() -> None:
        quota = Quota(messages_per_second=10, bytes_per_second=1000)
        assert taken(quota, b"a", 1, 1000) == 10 * BURST_SECONDS
        for _ in range(20):
            await trio.sleep(0.5)
            assert taken(quota, b"a", 1, 1000) == 5

    in_time(script)


def test_bytes_count_as_well() -> None:
    async def script() -> None:
        quota = Quota(messages_per_second=1000, bytes_per_second=1000)
        assert taken(quota, b"a", 400, 100) == 5
        await trio.sleep(1)
        assert taken(quota, b"a", 400, 100) == 2
        assert not quota.take(b"a", 5000), "more than a burst never passes"

    in_time(script)


def test_one_key_does_not_use_up_anothers() -> None:
    async def script() -> None:
        quota = Quota(messages_per_second=10, bytes_per_second=1000)
        taken(quota, b"a", 1, 1000)
        assert taken(quota, b"b", 1, 1000) == 10 * BURST_SECONDS

    in_time(script)


def test_a_long_silence_saves_up_no_more_than_a_burst() -> None:
    async def script() -> None:
        quota = Quota(messages_per_second=10, bytes_per_second=1000)
        await trio.sleep(3600)
        assert taken(quota, b"a", 1, 1000) == 10 * BURST_SECONDS

    in_time(script)
