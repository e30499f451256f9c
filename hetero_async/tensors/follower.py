"""The worker's tensors as its background uses them: fulfils ports.Follower with a Replica's schema and a Shadow."""

import math
from collections.abc import Collection, Sequence

import safetensors.torch
import torch
from safetensors import SafetensorError

from hetero_async.core.messages import INITIAL, PUBLISH, SNAPSHOT
from hetero_async.errors import PeerError
from hetero_async.tensors.buffers import Changes, Values, first_infinite, with_buffers
from hetero_async.tensors.codecs import WITH_FEEDBACK, encode_payload
from hetero_async.tensors.devices import staged
from hetero_async.tensors.feedback import ErrorFeedback
from hetero_async.tensors.replica import Replica, Shadow


class Follower:
    def __init__(self, replica: Replica) -> None:
        self.schema = replica.schema.to_bytes()
        self.schema_hash = replica.schema.hash
        self._replica = replica
        self._numel = replica.schema.numel
        self._specs = replica.schema.buffers
        self._shadow: Shadow | None = None
        self.initial: Shadow | None = None  # what the run began with, coarsely
        self._feedback = ErrorFeedback()

    def initial_upload(self) -> bytes:
        """Called before the training loop has begun, so the parameters hold still."""
        return self._replica.initial_upload()

    def encode(self, delta: object, codec: str, buffers: object = None) -> bytes:
        assert isinstance(delta, torch.Tensor)
        coded = self._feedback.encode(delta, codec) if codec in WITH_FEEDBACK else encode_payload(codec, delta)
        return with_buffers(self._specs, coded, _changes(buffers))

    def pushed(self, seq: int) -> None:
        self._feedback.pushed(seq)

    def answered(self, seq: int, is_accepted: bool) -> None:
        self._feedback.answered(seq, is_accepted)

    def feedback(self) -> bytes:
        kept = self._feedback.dump()
        return safetensors.torch.save(kept) if kept else b""

    def restore_feedback(self, content: bytes, accepted: Collection[int], unanswered: Collection[int]) -> None:
        try:
            kept = safetensors.torch.load(content)
        except (SafetensorError, KeyError) as error:
            raise PeerError(f"not what error feedback keeps: {error}") from error
        if any(vector.shape != (self._numel,) or vector.dtype != torch.float32 for vector in kept.values()):
            raise PeerError(f"it is of another model: this one has {self._numel} parameters")
        self._feedback.load(kept, accepted, unanswered)

    def norm(self, delta: object, buffers: object = None) -> float:
        """The square root of the dot product that the server takes, too."""
        assert isinstance(delta, torch.Tensor)
        if first_infinite(self._specs, _changes(buffers)):
            return math.nan
        return math.sqrt(float(torch.dot(delta, delta)))

    def take(self, kind: str, blob: bytes) -> int:
        if kind == SNAPSHOT:
            self._shadow = Shadow.from_snapshot(blob, self._numel, self._specs)
        elif kind == INITIAL and self._shadow is not None:
            self.initial = Shadow.from_snapshot(blob, self._numel, self._specs)
        elif kind == PUBLISH and self._shadow is not None:
            self._shadow.advance(blob)
        else:
            raise PeerError(f"a {kind} came that was not asked for")
        return self._shadow.number

    def merged_seq(self, worker: str) -> int:
        assert self._shadow is not None
        return self._shadow.merged.get(worker, 0)

    def published(self) -> torch.Tensor:
        assert self._shadow is not None
        return self._shadow.flat

    def target(self, pending: Sequence[tuple[str, bytes]]) -> torch.Tensor:
        assert self._shadow is not None
        return staged(self._shadow.target(pending), self._replica.device)

    @property
    def buffers(self) -> Values:
        assert self._shadow is not None
        return self._shadow.buffers


def _changes(buffers: object) -> Changes:
    assert buffers is None or isinstance(buffers, dict)
    return buffers or {}
