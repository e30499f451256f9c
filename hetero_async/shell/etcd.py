"""What is asked of one member of an etcd cluster, over the JSON gateway of its v3 interface (etcd 3.4 and newer).

Only witness.py calls it, and decides; here a question is asked once, at one member, and answered for sure or not at
all (WitnessAway). Waiting is bounded by the caller. What comes back is bounded, and checked against the types below.
"""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import httpx2
import trio
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.types import Base64Bytes

from hetero_async.errors import WitnessAway

# What we ask for is answered in a few hundred bytes.
ANSWER_BYTES_MAX = 64 * 1024
# Of what a member says beside its answer, so much is passed on to a person.
REASON_CHARACTERS_MAX = 100
NEVER_WRITTEN = "hetero-async//nothing"
NOT_FOUND = 5  # gRPC's code; for a lease: it has run out, or was given back


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """What a key holds. An absent key has revision 0; `revision` grows with every write."""

    content: bytes = b""
    revision: int = 0
    lease: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Keys at one moment. `term`: of etcd's own leader, as the member knew it when it answered."""

    values: Mapping[str, Value]
    term: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A lease after it was renewed. `seconds` is 0 when it has run out. `term`: as it was before the renewal."""

    seconds: int
    term: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Put:
    key: str
    content: bytes
    lease: int = 0


class Member(Protocol):
    """One way into the cluster. Every method raises WitnessAway; a write may have happened nevertheless, or happen
    later."""

    @property
    def name(self) -> str: ...

    async def read(self, keys: Sequence[str]) -> Reading:
        """Linearizable: a majority has just agreed that it is the newest."""
        ...

    async def write(self, expected: Mapping[str, int], puts: Sequence[Put]) -> bool:
        """All of it if each key still has the revision that is expected, else nothing (False)."""
        ...

    async def grant(self, seconds: int) -> int:
        """A new lease: its number."""
        ...

    async def keep_alive(self, lease: int) -> Kept: ...

    async def revoke(self, lease: int) -> None:
        """End the lease and delete its keys; well if it had ended before."""
        ...


# --- as the gateway writes it: 64-bit numbers are strings, contents are Base64, what is zero or empty is absent ---


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class _Header(_Answer):
    raft_term: int


class _KeyValue(_Answer):
    value: Base64Bytes = b""
    mod_revision: int
    lease: int = 0


class _Range(_Answer):
    kvs: list[_KeyValue] = Field(default=[], max_length=1)


class _Response(_Answer):
    response_range: _Range | None = None


class _ReadAnswer(_Answer):
    header: _Header
    succeeded: bool
    responses: list[_Response]


class _WriteAnswer(_Answer):
    header: _Header
    succeeded: bool = False


class _GrantAnswer(_Answer):
    lease: int = Field(alias="ID", gt=0)


class _KeptLease(_Answer):
    header: _Header
    lease: int = Field(alias="ID")
    seconds: int = Field(default=0, alias="TTL")


class _KeepAliveAnswer(_Answer):
    result: _KeptLease


class _RevokeAnswer(_Answer):
    header: _Header


class _Refusal(_Answer):
    error: str
    code: int = 0


A = TypeVar("A", bound=_Answer)


class EtcdMember:
    """Fulfils Member for one URL."""

    def __init__(self, url: str, client: httpx2.AsyncClient) -> None:
        self.name = url.rstrip("/")
        self._client = client

    async def read(self, keys: Sequence[str]) -> Reading:
        ranges = [{"request_range": {"key": _base64(key.encode())}} for key in keys]
        # With something to delete, though it is never there, the question goes through etcd's log. One without may be
        # held up for seconds, with all that come after it, when it meets a leader that has just been elected (3.4).
        nothing = {"request_delete_range": {"key": _base64(NEVER_WRITTEN.encode())}}
        answer = await self._ask("kv/txn", {"success": [*ranges, nothing]}, _ReadAnswer)
        found = [response.response_range for response in answer.responses if response.response_range is not None]
        if len(found) != len(keys):
            raise self._away("its answer is not that of an etcd server: it is about other keys")
        values = {key: _value(part.kvs) for key, part in zip(keys, found, strict=True)}
        return Reading(values=values, term=answer.header.raft_term)

    async def write(self, expected: Mapping[str, int], puts: Sequence[Put]) -> bool:
        compare = [
            {"key": _base64(key.encode()), "target": "MOD", "result": "EQUAL", "mod_revision": str(revision)}
            for key, revision in expected.items()
        ]
        success = [
            {"request_put": {"key": _base64(put.key.encode()), "value": _base64(put.content), "lease": str(put.lease)}}
            for put in puts
        ]
        return (await self._ask("kv/txn", {"compare": compare, "success": success}, _WriteAnswer)).succeeded

    async def grant(self, seconds: int) -> int:
        return (await self._ask("lease/grant", {"TTL": str(seconds)}, _GrantAnswer)).lease

    async def keep_alive(self, lease: int) -> Kept:
        kept = (await self._ask("lease/keepalive", {"ID": str(lease)}, _KeepAliveAnswer)).result
        if kept.lease != lease:
            raise self._away("its answer is about another lease")
        return Kept(seconds=kept.seconds, term=kept.header.raft_term)

    async def revoke(self, lease: int) -> None:
        status, body = await self._post("lease/revoke", {"ID": str(lease)})
        refusal = _refusal(body)
        if status == httpx2.codes.NOT_FOUND and refusal is not None and refusal.code == NOT_FOUND:
            return
        self._understood(status, body, _RevokeAnswer)

    # --- HTTP ---

    async def _ask(self, path: str, question: Mapping[str, Any], kind: type[A]) -> A:
        return self._understood(*await self._post(path, question), kind)

    async def _post(self, path: str, question: Mapping[str, Any]) -> tuple[int, bytes]:
        body = b""
        try:
            async with self._client.stream("POST", f"{self.name}/v3/{path}", json=question) as response:
                # Cancelling ends all the generators that httpx2 reads through; leaving the loop would not.
                with trio.CancelScope() as enough:
                    async for piece in response.aiter_raw():
                        body += piece
                        if len(body) > ANSWER_BYTES_MAX:
                            enough.cancel()
        except httpx2.HTTPError as error:
            raise self._away(_short(str(error)) or type(error).__name__) from error
        if len(body) > ANSWER_BYTES_MAX:
            raise self._away(f"its answer is longer than {ANSWER_BYTES_MAX} bytes")
        return response.status_code, body

    def _understood(self, status: int, body: bytes, kind: type[A]) -> A:
        if status != httpx2.codes.OK:
            refusal = _refusal(body)
            raise self._away(f"{status} {_short(refusal.error) if refusal else ''}".rstrip())
        try:
            return kind.model_validate_json(body)
        except ValidationError as error:
            raise self._away("its answer is not that of an etcd server") from error

    def _away(self, reason: str) -> WitnessAway:
        return WitnessAway(f"{self.name}: {reason}")


def _refusal(body: bytes) -> _Refusal | None:
    try:
        return _Refusal.model_validate_json(body)
    except ValidationError:
        return None


def _value(kvs: Iterable[_KeyValue]) -> Value:
    for kv in kvs:
        return Value(content=kv.value, revision=kv.mod_revision, lease=kv.lease)
    return Value()


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _short(reason: str) -> str:
    """One line of what somebody else wrote."""
    return json.dumps(reason[:REASON_CHARACTERS_MAX], ensure_ascii=True)[1:-1]
