"""The worker's tensors: the replica in training on its device, and the shadow that follows the server on the CPU.

Replica belongs to the user's thread, Shadow to the background. What passes between them is a delta on the way out and
a target on the way in, both flat fp32 vectors in the schema's order, and with each the model's buffers (buffers.py).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import safetensors.torch
import torch
import xxhash

from hetero_async.core.publish_note import PublishNote
from hetero_async.errors import PeerError, SchemaError
from hetero_async.formats import frames
from hetero_async.formats.parts import pack_parts, unpack_parts
from hetero_async.tensors.buffers import (
    Changes,
    LocalBuffers,
    Specs,
    Values,
    buffers_in,
    changed,
    without_buffers,
)
from hetero_async.tensors.codecs import decode_payload, encode_payload
from hetero_async.tensors.devices import describe
from hetero_async.tensors.schema import schema_of

# Calls a layer with arguments.
Call = Callable[[torch.nn.Module, Sequence[torch.Tensor]], object]


class Replica:
    """A model's distinct trainable parameters, and `base`: what its next delta is measured from."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Raises SchemaError for a model that cannot be trained this way."""
        self.schema = schema_of(model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._parameters = [parameters[tensor.name] for tensor in self.schema.tensors]
        self.ids = frozenset(map(id, self._parameters))
        devices = {parameter.device: None for parameter in self._parameters}
        if len(devices) > 1:
            raise SchemaError(f"the model lies on several devices: {', '.join(map(str, devices))}")
        self.device = next(iter(devices))
        self.dtype = self._parameters[0].dtype
        self._model = model
        self._begin()

    def _begin(self) -> None:
        self._base = torch.empty(self.schema.numel, device=self.device)
        self._buffers = LocalBuffers(self._model, self.schema.buffers)
        self.reset(self._flat().cpu())

    @property
    def described(self) -> str:
        """What it trains on, in words for people."""
        return describe(self.device)

    def initial_upload(self) -> bytes:
        """The parameters to the bit (fp32), and the buffers of the model's state_dict.

        Frozen parameters do not travel: under a few trained adapters there may lie a model of any size.
        """
        constants = {name: value.detach().cpu().contiguous().clone() for name, value in self._constants()}
        return pack_parts(encode_payload("fp32", self._flat()), safetensors.torch.save(constants))

    def _constants(self) -> Iterator[tuple[str, torch.Tensor]]:
        parameters = {name for name, _ in self._model.named_parameters(remove_duplicate=False)}
        for name, value in self._model.state_dict().items():
            if name not in parameters and isinstance(value, torch.Tensor):  # some modules keep bytes in there as well
                yield name, value

    @torch.no_grad()
    def cut(self) -> torch.Tensor:
        """A round ends: its delta (base − local), on the model's device; the next is measured from here.

        Raises SchemaError where the model has other parameters by now than those that the run trains.
        """
        self._check_model()
        delta = self._base.clone()
        for piece, base, local in self._pieces(delta):
            piece.sub_(local)
            base.copy_(local)
        return delta

    def cut_buffers(self) -> Changes:
        return self._buffers.cut()

    def _check_model(self) -> None:
        now = dict(self._model.named_parameters(remove_duplicate=False))
        for tensor, parameter in zip(self.schema.tensors, self._parameters, strict=True):
            if now.get(tensor.name) is not parameter:
                raise SchemaError(f"{tensor.name} was replaced after joining: change the model before that")
            if tuple(parameter.shape) != tensor.shape:
                shapes = f"from {list(tensor.shape)} to {list(parameter.shape)}"
                raise SchemaError(f"{tensor.name} went {shapes} after joining: change the model before that")
        for name, parameter in now.items():
            if parameter.requires_grad and id(parameter) not in self.ids:
                raise SchemaError(
                    f"{name} requires a gradient and did not when the model joined: nobody else would learn of it; "
                    "add or unfreeze parameters before joining"
                )

    @torch.no_grad()
    def adopt(self, target: object, buffers: object = ()) -> None:
        """Stand on `target` and keep the round's progress: local := target − (base − local), base := target.

        `buffers`: the run's, for which buffers.py has a rule of its own.

        Parameters that cannot hold the sum exactly are given the nearest value, and their base moves with them:
        rounding is not progress and must not be pushed as if it were.
        """
        self._buffers.adopt(values_of(buffers))
        for new, base, local in self._pieces(self._here(target)):
            move(new, base, local)

    @torch.no_grad()
    def reset(self, target: object, buffers: object = ()) -> None:
        """Stand on `target` with no progress, and with the run's buffers."""
        self._buffers.reset(values_of(buffers))
        for new, base, local in self._pieces(self._here(target)):
            local.copy_(new)
            base.copy_(local)

    @contextlib.contextmanager
    def showing(self, flat: object, buffers: object = ()) -> Iterator[None]:
        """The model has these parameters and buffers in here, in its own dtypes, and afterwards its own again, to the
        bit."""
        own = [parameter.detach().clone() for parameter in self._parameters]
        gradients = [parameter.grad for parameter in self._parameters]
        with torch.no_grad():
            for new, _, local in self._pieces(self._here(flat)):
                local.copy_(new)
        for parameter in self._parameters:
            parameter.grad = None
        try:
            with self._buffers.showing(values_of(buffers)):
                yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._parameters, own, strict=True):
                    parameter.copy_(value)
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient

    @contextlib.contextmanager
    def calling(self, flat: object, buffers: object = ()) -> Iterator[Call]:
        """In here, what calls a layer with these parameters and buffers."""
        with self.showing(flat, buffers):
            yield lambda layer, given: layer(*given)

    def progress(self) -> torch.Tensor:
        """What the round has done so far: base − local."""
        return self._base - self._flat()

    def _here(self, target: object) -> torch.Tensor:
        assert isinstance(target, torch.Tensor)
        return target.to(self.device, non_blocking=target.is_pinned())  # which a Follower sees to

    def _flat(self) -> torch.Tensor:
        return torch.cat([parameter.detach().float().reshape(-1) for parameter in self._parameters])

    def _pieces(self, flat: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Per parameter: its stretch of `flat` and of the base, shaped like it, and itself."""
        start = 0
        for parameter in self._parameters:
            stop = start + parameter.numel()
            yield flat[start:stop].view(parameter.shape), self._base[start:stop].view(parameter.shape), parameter
            start = stop


def values_of(buffers: object) -> Values:
    assert isinstance(buffers, tuple)
    return buffers


def move(new: torch.Tensor, base: torch.Tensor, local: torch.Tensor) -> None:
    """What `Replica.adopt` does to one tensor, or to a part of it."""
    progress = base - local.float()
    local.copy_(new - progress)
    if local.dtype == torch.float32:
        base.copy_(new)
    else:
        torch.add(local.float(), progress, out=base)


class Shadow:
    """The worker's copy of the server's shadow, moved by publishes, checked by hash each time."""

    def __init__(self, note: PublishNote, flat: torch.Tensor, specs: Specs = (), buffers: Values = ()) -> None:
        """Raises PeerError when the vectors are not those that the note was written for."""
        self._specs = specs
        self._stand_on(note, flat, buffers)

    @classmethod
    def from_snapshot(cls, blob: bytes, numel: int, specs: Specs = ()) -> "Shadow":
        """Raises PeerError for a damaged snapshot, or one of another size."""
        note, payload = read_object(blob)
        buffers = buffers_in(specs, payload)
        if len(buffers) < len(specs):
            raise PeerError(f"a snapshot has {len(buffers)} of the model's {len(specs)} buffers")
        flat = decode_payload(note.codec, without_buffers(specs, payload), numel)
        return cls(note, flat, specs, tuple(buffers.values()))

    def advance(self, blob: bytes) -> None:
        """Apply the next publish. Raises PeerError, and stays as it was, when the outcome is not the server's."""
        note, payload = read_object(blob)
        if note.number != self.number + 1:
            raise PeerError(f"publish {note.number} does not follow publish {self.number}")
        buffers = changed(self.buffers, buffers_in(self._specs, payload))
        coded = without_buffers(self._specs, payload)
        self._stand_on(note, decode_payload(note.codec, coded, self.flat.numel()).add_(self.flat), buffers)

    def target(self, pending: Sequence[tuple[str, bytes]]) -> torch.Tensor:
        """Shadow − Σ decoded deltas, in their order; a fresh tensor."""
        target = self.flat.clone()
        for codec, payload in pending:
            target.sub_(decode_payload(codec, without_buffers(self._specs, payload), target.numel()))
        return target

    def _stand_on(self, note: PublishNote, flat: torch.Tensor, buffers: Values) -> None:
        if hash_of(flat, buffers) != note.shadow_hash:
            raise PeerError(f"after publish {note.number} the parameters are not the server's")
        self.flat, self.buffers = flat, buffers
        self.number, self.version, self.merged = note.number, note.version, dict(note.merged)


def hash_of(flat: torch.Tensor, buffers: Values = ()) -> bytes:
    """xxh3_128 of CPU vectors' bytes."""
    whole = xxhash.xxh3_128(flat.numpy().data)
    for buffer in buffers:
        whole.update(buffer.numpy().data)
    return whole.digest()


def write_object(note: PublishNote, payload: bytes) -> bytes:
    return pack_parts(frames.encode(note, frames.RECORD_BYTES_MAX), payload)


def read_object(blob: bytes) -> tuple[PublishNote, bytes]:
    """A publish or snapshot object's note and payload. Raises PeerError."""
    header, payload = unpack_parts(blob, 2)
    note = frames.decode(bytes(header), frames.RECORD_BYTES_MAX)
    if not isinstance(note, PublishNote):
        raise PeerError(f"expected a publish, got a {type(note).__name__}")
    return note, bytes(payload)
