"""What the user's thread asks of the background."""

import trio
import trio.testing

from hetero_async.actors.threads import soon


def test_what_is_asked_of_the_background_is_done_there_and_nothing_breaks_when_that_has_ended() -> None:
    done: list[int] = []

    async def background() -> trio.lowlevel.TrioToken:
        token = trio.lowlevel.current_trio_token()
        await trio.to_thread.run_sync(soon, token, done.append, 1)
        await trio.testing.wait_all_tasks_blocked()
        return token

    ended = trio.run(background)
    assert done == [1]
    soon(ended, done.append, 2)
    assert done == [1]
