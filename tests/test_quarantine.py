"""Who is heard no more: after how many strikes, for how long, and who never."""

from collections.abc import Awaitable, Callable

import trio
import trio.testing

from hetero_async.ports import Peer
from hetero_async.quarantine import STRIKE_PERIOD_SECONDS, STRIKES_MAX, Quarantine, Quarantined

WORKER = Peer(key=b"k" * 40, role="worker", site="a", worker="a-0")


class Notes:
    def __init__(self) -> None:
        self.names: list[str] = []

    def event(self, name: str, **fields: object) -> None:
        self.names.append(name)


def in_time(script: Callable[[], Awaitable[None]]) -> None:
    trio.run(script, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_worker_is_shut_out_with_the_last_reason_when_its_chances_are_used_up() -> None:
    async def script() -> None:
        notes, saved = Notes(), list[dict[bytes, Quarantined]]()
        quarantine = Quarantine(notes, save=lambda keys: saved.append(dict(keys)))
        for strike in range(STRIKES_MAX):
            assert quarantine.refusal(WORKER.key) == ""
            quarantine.strike(WORKER, f"reason {strike}")
        reason = "10 times refused, at last: reason 9"
        assert quarantine.refusal(WORKER.key).startswith(f"quarantined: {reason}; ")
        assert saved == [{WORKER.key: Quarantined(worker="a-0", reason=reason)}]
        quarantine.strike(WORKER, "one more")
        assert quarantine.listed() == [{"key": "k" * 40, "worker": "a-0", "reason": reason}]
        assert notes.names == ["quarantined"]

    in_time(script)


def test_strikes_that_are_far_apart_do_not_add_up() -> None:
    async def script() -> None:
        quarantine = Quarantine(Notes())
        for _ in range(3 * STRIKES_MAX):
            quarantine.strike(WORKER, "now and then")
            await trio.sleep(STRIKE_PERIOD_SECONDS / (STRIKES_MAX - 2))
        assert not quarantine.keys

    in_time(script)


def test_whoever_is_let_out_has_all_his_chances_again() -> None:
    async def script() -> None:
        notes = Notes()
        quarantine = Quarantine(notes, {WORKER.key: Quarantined(worker="a-0", reason="from before")})
        assert quarantine.lift(WORKER.key)
        assert not quarantine.lift(WORKER.key)
        for _ in range(STRIKES_MAX - 1):
            quarantine.strike(WORKER, "again")
        assert quarantine.refusal(WORKER.key) == ""
        quarantine.strike(WORKER, "again")
        assert quarantine.refusal(WORKER.key)
        assert notes.names == ["quarantine lifted", "quarantined"]

    in_time(script)


def test_an_operator_or_a_standby_is_never_shut_out() -> None:
    async def script() -> None:
        quarantine = Quarantine(Notes())
        for role in ("admin", "standby"):
            for _ in range(2 * STRIKES_MAX):
                quarantine.strike(Peer(key=b"o" * 40, role=role, site="a", worker="o"), "garbage")
        assert not quarantine.keys

    in_time(script)


def test_a_long_reason_is_cut_to_what_a_message_can_carry() -> None:
    async def script() -> None:
        quarantine = Quarantine(Notes())
        for _ in range(STRIKES_MAX):
            quarantine.strike(WORKER, "x" * 5000)
        assert len(quarantine.refusal(WORKER.key)) < 1000

    in_time(script)
