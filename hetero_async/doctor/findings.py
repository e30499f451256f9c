"""What the doctor finds: one line each, that ends with what to do."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from hetero_async.errors import HeteroAsyncError

State = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`subject`: what was looked at. `told`: what was found and, unless it is ok, what to do about it."""

    subject: str
    state: State
    told: str


def ok(subject: str, told: str) -> Finding:
    return Finding(subject, "ok", told)


def warning(subject: str, told: str) -> Finding:
    return Finding(subject, "warning", told)


def failed(subject: str, told: str) -> Finding:
    return Finding(subject, "failed", told)


def told_by(subject: str, examine: Callable[[], str]) -> Iterator[Finding]:
    """One finding: what is returned is well, an error's message says what is not and what to do."""
    try:
        yield ok(subject, examine())
    except HeteroAsyncError as error:
        yield failed(subject, str(error))
