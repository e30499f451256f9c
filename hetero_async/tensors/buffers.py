"""The model's own buffers: what batch normalization has counted, and its like. How they travel and are merged.

A buffer is handled as its *numbers*: one flat vector, fp32 where it is floating (complex ones as pairs), int64 where it
holds integers or truth values. Only what has changed travels, without loss: what stays constant, a mask or frozen
statistics, costs nothing. Gradients say nothing about buffers, so no outer rule applies to them; see `merged`.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch

from hetero_async.errors import PeerError
from hetero_async.formats.compression import compress, decompress
from hetero_async.formats.parts import pack_parts, unpack_parts
from hetero_async.tensors.codecs import decode_payload, encode_payload
from hetero_async.tensors.schema import FLOATING, FLOATS, INTEGER, INTEGERS, BufferSpec

Specs = Sequence[BufferSpec]
Values = tuple[torch.Tensor, ...]  # of every buffer, in the schema's order
Changes = Mapping[int, torch.Tensor]  # of some of them, by their number in that order
INTEGER_BYTES = 8
DTYPES = {FLOATING: FLOATS, INTEGER: INTEGERS}


class LocalBuffers:
    """The buffers of a model in training. Belongs to the user's thread."""

    def __init__(self, model: torch.nn.Module, specs: Specs) -> None:
        # Some modules put another tensor in a buffer's place instead of writing into it.
        self._places = [(_owner(model, spec.name)._buffers, spec.name.rpartition(".")[2]) for spec in specs]
        self._base = [self.numbers(index).clone() for index in range(len(specs))]
        self._has_changed = [False] * len(specs)
        self._taken: Values = ()  # what the run's were when they were last looked at

    def cut(self) -> Changes:
        """What the buffers are that the round has changed: copies on the model's device. The next begins here."""
        self._notice()
        changed = {index: self._base[index] for index, has_changed in enumerate(self._has_changed) if has_changed}
        self._has_changed = [False] * len(self._places)
        return changed

    @torch.no_grad()
    def adopt(self, run: Values) -> None:
        """Take what the run has newly come to. Where a buffer has changed since the last push: the mean of both, or of
        integers the larger.

        To take the run's alone would forget what own batches have shown since the push, and over a slow link that is
        nearly a whole round, each time. To add what has changed since then, as is done with parameters, could make a
        variance negative. Any point between two statistics is one, and what a mean keeps of the older halves each time.
        """
        self._notice()
        for index, new in enumerate(run):
            if self._taken and is_same(new, self._taken[index]):
                continue
            own = self._base[index]
            new = new.to(own.device)
            if self._has_changed[index]:
                new = own * 0.5 + new * 0.5 if own.is_floating_point() else torch.maximum(own, new)
            self.put(index, new)
        self._taken = run

    @torch.no_grad()
    def reset(self, run: Values) -> None:
        """Begin with the run's."""
        for index, new in enumerate(run):
            self.put(index, new.to(self._base[index].device))
        self._has_changed = [False] * len(self._places)
        self._taken = run

    @contextlib.contextmanager
    def showing(self, run: Values) -> Iterator[None]:
        """The model has these in here, and afterwards its own again."""
        own = [self._tensor(index).clone() for index in range(len(run))]
        with torch.no_grad():
            for index, new in enumerate(run):
                put_into(self._tensor(index), new)
        try:
            yield
        finally:
            with torch.no_grad():
                for index, value in enumerate(own):
                    self._tensor(index).copy_(value)

    def _notice(self) -> None:
        for index, base in enumerate(self._base):
            if not is_same(numbers := self.numbers(index), base):
                self._base[index], self._has_changed[index] = numbers.clone(), True

    def put(self, index: int, new: torch.Tensor) -> None:
        buffer = self._tensor(index)
        if not is_same(numbers_of(buffer), new):  # fp64 that says the same already keeps its last digits
            put_into(buffer, new)
            self._base[index] = self.numbers(index).clone()

    def numbers(self, index: int) -> torch.Tensor:
        return numbers_of(self._tensor(index))

    def _tensor(self, index: int) -> torch.Tensor:
        buffers, name = self._places[index]
        buffer = buffers[name]
        assert buffer is not None, f"buffer {name} was taken away"
        return buffer


def _owner(model: torch.nn.Module, name: str) -> torch.nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def numbers_of(buffer: torch.Tensor) -> torch.Tensor:
    """Flat fp32 or int64, on the buffer's device; may share its memory."""
    plain = torch.view_as_real(buffer.resolve_conj()) if buffer.is_complex() else buffer
    return plain.detach().to(torch.float32 if plain.is_floating_point() else torch.int64).reshape(-1).contiguous()


def put_into(buffer: torch.Tensor, numbers: torch.Tensor) -> None:
    """What `numbers_of` gave, in the buffer's own dtype and shape."""
    plain = torch.view_as_real(buffer) if buffer.is_complex() else buffer
    plain.copy_(numbers.view(plain.shape))


def is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """To the bit: a NaN is the same as itself."""
    return one is other or torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def merged(before: Values, given: Sequence[tuple[int, Changes]]) -> Values:
    """The buffers after an outer step over deltas of so many samples, each with what its round has changed.

    Floating ones: the mean Σn·x / Σn over those deltas, in fp64 and in their order; integers: the largest (a truth
    value that one has found holds). What was before has no part in it: a statistic is a running mean already, of its
    worker's last batches and of what the parameters have become, and one that is mixed with those of earlier steps
    would lag behind the parameters. So where a merge has one delta its buffers are the run's, as in training alone.
    """
    after = list(before)
    for index in range(len(before)):
        found = [(samples, changes[index]) for samples, changes in given if index in changes]
        if found:
            after[index] = _mean(found) if before[index].is_floating_point() else _largest(found)
    return tuple(after)


def _mean(found: Sequence[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """Each product is rounded before it is added, as in tensors/outer.py. Of equal values it is that value."""
    total = torch.zeros(found[0][1].shape, dtype=torch.float64)
    for samples, numbers in found:
        total.add_(numbers.double().mul_(samples))
    return total.div_(torch.tensor(float(sum(samples for samples, _ in found)), dtype=torch.float64)).float()


def _largest(found: Sequence[tuple[int, torch.Tensor]]) -> torch.Tensor:
    return torch.stack([numbers for _, numbers in found]).amax(dim=0)


def changes_between(before: Values, after: Values) -> Changes:
    return {index: new for index, new in enumerate(after) if not is_same(before[index], new)}


def changed(before: Values, changes: Changes) -> Values:
    return tuple(changes.get(index, value) for index, value in enumerate(before))


def first_infinite(specs: Specs, changes: Changes) -> str:
    """The name of a buffer that holds a NaN or an infinity; "" when none does. Integers hold none."""
    return next((specs[index].name for index, numbers in changes.items() if not numbers.isfinite().all()), "")


def initial_values(specs: Specs, tensors: Mapping[str, torch.Tensor]) -> Values:
    """From the model's tensors that are not trained. Raises PeerError where one is missing or another's."""
    values = []
    for spec in specs:
        found = tensors.get(spec.name)
        numbers = numbers_of(found) if found is not None and found.dtype in DTYPES[spec.kind] else None
        if numbers is None or numbers.numel() != spec.numel:
            raise PeerError(f"the model's other tensors have no buffer {spec.name} of {spec.numel} {spec.kind} numbers")
        values.append(numbers.clone())
    return tuple(values)


# --- as bytes ---


def with_buffers(specs: Specs, coded: bytes, changes: Changes) -> bytes:
    """A payload of coded parameters with what has become of the buffers behind it, if the model has any at all."""
    return pack_parts(coded, _pack(specs, changes) if changes else b"") if specs else coded


def without_buffers(specs: Specs, payload: bytes | bytearray) -> bytes | bytearray | memoryview:
    """The coded parameters alone, not copied. Raises PeerError."""
    return unpack_parts(payload, 2)[0] if specs else payload


def buffers_in(specs: Specs, payload: bytes | bytearray) -> Changes:
    """Raises PeerError for anything but what `with_buffers` writes."""
    packed = unpack_parts(payload, 2)[1] if specs else b""
    return _unpack(specs, packed) if packed else {}


def payload_bytes_max(specs: Specs) -> int:
    """The most that buffers add to a payload, beside the slack that any payload is granted."""
    return sum((INTEGER_BYTES + 1) * spec.numel + 2 for spec in specs)


def _pack(specs: Specs, changes: Changes) -> bytes:
    """A byte for each buffer, whether it has changed; of those, the floating ones as codec fp32; the integers."""
    of_kind: dict[bool, list[torch.Tensor]] = {True: [torch.empty(0)], False: [torch.empty(0, dtype=torch.int64)]}
    for index, spec in enumerate(specs):
        if index in changes:
            of_kind[spec.is_floating].append(changes[index].cpu())
    floating, integers = torch.cat(of_kind[True]), torch.cat(of_kind[False])
    which = bytes(index in changes for index in range(len(specs)))
    return pack_parts(compress(which), encode_payload("fp32", floating), compress(integers.numpy().tobytes()))


def _unpack(specs: Specs, packed: bytes | memoryview) -> Changes:
    which, floating, integers = (bytes(part) for part in unpack_parts(packed, 3))
    flags = decompress(which, len(specs))
    if not set(flags) <= {0, 1}:
        raise PeerError("what says which buffers have changed is neither 0 nor 1")
    counts = {True: 0, False: 0}
    for flag, spec in zip(flags, specs, strict=True):
        counts[spec.is_floating] += flag * spec.numel
    raw = decompress(integers, INTEGER_BYTES * counts[False])
    rest = {
        True: decode_payload("fp32", floating, counts[True]),
        False: torch.frombuffer(bytearray(raw), dtype=torch.int64) if raw else torch.empty(0, dtype=torch.int64),
    }
    changes: dict[int, torch.Tensor] = {}
    for index, (flag, spec) in enumerate(zip(flags, specs, strict=True)):
        if flag:
            kind = spec.is_floating
            changes[index], rest[kind] = rest[kind][: spec.numel], rest[kind][spec.numel :]
    return changes
