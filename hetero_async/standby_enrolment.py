"""How a standby's host gets into a run: by the same steps as a site's (enrolment.py), with more to be told.

The verb `join-standby` runs on the standby's host. Its secret key never leaves it, and what it needs of the server's
own run.toml it is told once that key is let in. Who else is let in it learns again and again while it follows
(standby.py): when it serves, its own list counts.
"""

from collections.abc import Callable, Mapping
from typing import Any

import trio

from hetero_async.enrolment import Enrolment, let_in, write_run_toml
from hetero_async.errors import HeteroAsyncError, UserError
from hetero_async.ports import Observer
from hetero_async.shell.keys import AllowList
from hetero_async.shell.signals import stop_on_signal


async def join_standby(enrolment: Enrolment, observer: Observer, tell: Callable[[str], None]) -> None:
    """Make what is missing, wait until the server lets the key in, and write down all that `standby` needs."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_on_signal, nursery.cancel_scope)
        told = await let_in(enrolment, observer, tell)
        write_standby(enrolment, told)
        tell(f"let in: {enrolment.site} is a standby; wrote {enrolment.run_toml}")
        tell(f"next: hetero-async standby --name {enrolment.site} --run {enrolment.run_toml}")
        nursery.cancel_scope.cancel()


def write_standby(enrolment: Enrolment, told: Mapping[str, Any]) -> None:
    """run.toml and the list of who is let in. Raises UserError, ConfigError, HeteroAsyncError."""
    address = enrolment.server.address
    standbys = told.get("standbys")
    if not isinstance(standbys, dict) or enrolment.site not in standbys:
        raise UserError(f"--name {enrolment.site}: the run.toml at {address} has no [standbys.{enrolment.site}]")
    if "allowed" not in told:
        raise HeteroAsyncError(f"{address} does not tell who is let in: install the same version there first")
    config = write_run_toml(enrolment, told)
    AllowList(config.allowed).adopt(told["allowed"])
