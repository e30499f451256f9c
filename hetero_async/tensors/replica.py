"""The worker's tensors: the replica in training on its device, and the shadow that follows the server on the CPU.

Replica belongs to the user's thread, Shadow to the background. What passes between them is a delta on the way out and
a target on the way in, both flat fp32 vectors in the schema's order.
"""

import contextlib
from collections.abc import Iterator, Sequence

import safetensors.torch
import torch
import xxhash

from hetero_async.core.publish_note import PublishNote
from hetero_async.errors import PeerError, SchemaError
from hetero_async.formats import frames
from hetero_async.formats.parts import pack_parts, unpack_parts
from hetero_async.tensors.codecs import decode_payload, encode_payload
from hetero_async.tensors.schema import schema_of


class Replica:
    """A model's distinct trainable parameters, and `base`: what its next delta is measured from."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Raises SchemaError for a model that cannot be trained this way."""
        self.schema = schema_of(model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._parameters = [parameters[tensor.name] for tensor in self.schema.tensors]
        devices = {parameter.device: None for parameter in self._parameters}
        if len(devices) > 1:
            raise SchemaError(f"the model lies on several devices: {', '.join(map(str, devices))}")
        self.device = next(iter(devices))
        self.dtype = self._parameters[0].dtype
        self._model = model
        self._base = torch.empty(self.schema.numel, device=self.device)
        self.reset(self._flat().cpu())

    def initial_upload(self) -> bytes:
        """The parameters to the bit (fp32), and every other tensor of the model's state_dict."""
        trained = {tensor.name for tensor in self.schema.tensors} | {alias for alias, _ in self.schema.aliases}
        constants = {
            name: value.detach().cpu().contiguous().clone()
            for name, value in self._model.state_dict().items()
            if name not in trained and isinstance(value, torch.Tensor)  # some modules keep bytes in there as well
        }
        return pack_parts(encode_payload("fp32", self._flat()), safetensors.torch.save(constants))

    @torch.no_grad()
    def cut(self) -> torch.Tensor:
        """A round ends: its delta (base − local), on the model's device; the next is measured from here."""
        delta = self._base.clone()
        for piece, base, local in self._pieces(delta):
            piece.sub_(local)
            base.copy_(local)
        return delta

    @torch.no_grad()
    def adopt(self, target: object) -> None:
        """Stand on `target` and keep the round's progress: local := target − (base − local), base := target.

        Parameters that cannot hold the sum exactly are given the nearest value, and their base moves with them:
        rounding is not progress and must not be pushed as if it were.
        """
        for new, base, local in self._pieces(self._here(target)):
            progress = base - local.float()
            local.copy_(new - progress)
            if local.dtype == torch.float32:
                base.copy_(new)
            else:
                torch.add(local.float(), progress, out=base)

    @torch.no_grad()
    def reset(self, target: object) -> None:
        """Stand on `target` with no progress."""
        for new, base, local in self._pieces(self._here(target)):
            local.copy_(new)
            base.copy_(local)

    @contextlib.contextmanager
    def showing(self, flat: object) -> Iterator[None]:
        """The model has these parameters in here, in its own dtype, and afterwards its own again, to the bit."""
        own = [parameter.detach().clone() for parameter in self._parameters]
        gradients = [parameter.grad for parameter in self._parameters]
        with torch.no_grad():
            for new, _, local in self._pieces(self._here(flat)):
                local.copy_(new)
        for parameter in self._parameters:
            parameter.grad = None
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._parameters, own, strict=True):
                    parameter.copy_(value)
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient

    def progress(self) -> torch.Tensor:
        """What the round has done so far: base − local."""
        return self._base - self._flat()

    def _here(self, target: object) -> torch.Tensor:
        assert isinstance(target, torch.Tensor)
        return target.to(self.device)

    def _flat(self) -> torch.Tensor:
        return torch.cat([parameter.detach().float().reshape(-1) for parameter in self._parameters])

    def _pieces(self, flat: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Per parameter: its stretch of `flat` and of the base, shaped like it, and itself."""
        start = 0
        for parameter in self._parameters:
            stop = start + parameter.numel()
            yield flat[start:stop].view(parameter.shape), self._base[start:stop].view(parameter.shape), parameter
            start = stop


class Shadow:
    """The worker's copy of the server's shadow, moved by publishes, checked by hash each time."""

    def __init__(self, note: PublishNote, flat: torch.Tensor) -> None:
        """Raises PeerError when the vector is not the one that the note was written for."""
        self._stand_on(note, flat)

    @classmethod
    def from_snapshot(cls, blob: bytes, numel: int) -> "Shadow":
        """Raises PeerError for a damaged snapshot, or one of another size."""
        note, payload = read_object(blob)
        return cls(note, decode_payload(note.codec, payload, numel))

    def advance(self, blob: bytes) -> None:
        """Apply the next publish. Raises PeerError, and stays as it was, when the outcome is not the server's."""
        note, payload = read_object(blob)
        if note.number != self.number + 1:
            raise PeerError(f"publish {note.number} does not follow publish {self.number}")
        self._stand_on(note, decode_payload(note.codec, payload, self.flat.numel()).add_(self.flat))

    def target(self, pending: Sequence[tuple[str, bytes]]) -> torch.Tensor:
        """Shadow − Σ decoded deltas, in their order; a fresh tensor."""
        target = self.flat.clone()
        for codec, payload in pending:
            target.sub_(decode_payload(codec, payload, target.numel()))
        return target

    def _stand_on(self, note: PublishNote, flat: torch.Tensor) -> None:
        if hash_of(flat) != note.shadow_hash:
            raise PeerError(f"after publish {note.number} the parameters are not the server's")
        self.flat = flat
        self.number, self.version, self.merged = note.number, note.version, dict(note.merged)


def hash_of(flat: torch.Tensor) -> bytes:
    """xxh3_128 of a CPU vector's bytes."""
    return xxhash.xxh3_128_digest(flat.numpy().data)


def write_object(note: PublishNote, payload: bytes) -> bytes:
    return pack_parts(frames.encode(note, frames.RECORD_BYTES_MAX), payload)


def read_object(blob: bytes) -> tuple[PublishNote, bytes]:
    """A publish or snapshot object's note and payload. Raises PeerError."""
    header, payload = unpack_parts(blob, 2)
    note = frames.decode(bytes(header), frames.RECORD_BYTES_MAX)
    if not isinstance(note, PublishNote):
        raise PeerError(f"expected a publish, got a {type(note).__name__}")
    return note, bytes(payload)
