"""One model on all ranks of a torchrun group: what rank 0 gathers of it, and what it gives back to everybody.

A parameter is whole on every rank (plain, or under DistributedDataParallel) or in parts (a DTensor, as `fully_shard`
makes it). Tensors are gathered and spread one after another, so a rank never holds more than its own part and one
whole tensor; rank 0 alone has the flat vectors that every worker has, on its CPU where parameters are in parts. Every
method is a collective: rank 0 says which comes next, and the others take part without a target.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import safetensors.torch
import torch
import torch.distributed
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate

from hetero_async.errors import SchemaError, UserError
from hetero_async.formats.parts import pack_parts
from hetero_async.tensors.buffers import LocalBuffers
from hetero_async.tensors.codecs import encode_payload
from hetero_async.tensors.control import Control, Kind, Said
from hetero_async.tensors.replica import Call, Replica, move, values_of
from hetero_async.tensors.schema import Schema, difference

# Ranks whose gradients are averaged hold the same parameters, up to rounding. So many elements of each whole tensor are
# compared once a round; they may differ by so large a share of what the round has done.
COMPARED = 64
STRAYED_SHARE = 0.1


class Whole:
    """A parameter that every rank has all of. Rank 0's counts: the others' stray by rounding at most."""

    def __init__(self, parameter: torch.Tensor, is_first: bool) -> None:
        self.parameter = parameter
        self._base = parameter.detach().float().clone() if is_first else None

    def cut(self) -> torch.Tensor:
        """Base − local on rank 0; base := local."""
        if self._base is None:
            return self.parameter.new_empty(0)
        progress = self._base - self.parameter
        self._base.copy_(self.parameter)
        return progress

    def adopt(self, new: torch.Tensor | None) -> None:
        """`new`, fp32, on rank 0: what `Replica.adopt` stands on."""
        if self._base is not None and new is not None:
            move(new.to(self.parameter.device), self._base, self.parameter)
        self._spread()

    def put(self, new: torch.Tensor | None) -> None:
        if new is not None:
            self.parameter.copy_(new)
        self._spread()

    def reset(self, new: torch.Tensor | None) -> None:
        self.put(new)
        if self._base is not None:
            self._base.copy_(self.parameter)

    @property
    def local(self) -> torch.Tensor:
        return self.parameter

    def _spread(self) -> None:
        content = self.parameter.detach().contiguous()
        torch.distributed.broadcast(content, 0)
        if not self.parameter.is_contiguous():
            self.parameter.copy_(content)

    def compared(self) -> torch.Tensor:
        """Two rows: some of its elements, and on rank 0 what the round has done to them."""
        local = _some_of(self.parameter)
        return torch.stack([local, torch.zeros_like(local) if self._base is None else _some_of(self._base) - local])


class Sharded:
    """A parameter of which every rank has its part, whatever the mesh and the placements are."""

    def __init__(self, parameter: DTensor) -> None:
        self.parameter = parameter
        self._base = parameter.to_local().float().clone()

    def cut(self) -> torch.Tensor:
        local, like = self.local, self.parameter
        progress = DTensor.from_local(
            self._base - local, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )
        self._base.copy_(local)
        return progress.full_tensor()

    def adopt(self, new: torch.Tensor | None) -> None:
        move(self._part_of(new), self._base, self.local)

    def put(self, new: torch.Tensor | None) -> None:
        self.local.copy_(self._part_of(new))

    def reset(self, new: torch.Tensor | None) -> None:
        self.put(new)
        self._base.copy_(self.local)

    @property
    def local(self) -> torch.Tensor:
        return self.parameter.to_local()

    def _part_of(self, new: torch.Tensor | None) -> torch.Tensor:
        mesh, like = self.parameter.device_mesh, self.parameter
        content = torch.empty(like.shape, device=mesh.device_type)
        if new is not None:
            content.copy_(new)
        torch.distributed.broadcast(content, 0)
        everywhere = DTensor.from_local(content, mesh, [Replicate()] * mesh.ndim)
        return everywhere.redistribute(placements=like.placements).to_local().to(self._base.device)


class GroupReplica(Replica):
    def __init__(self, model: torch.nn.Module, control: Control) -> None:
        """`model` without its wrapper. Raises SchemaError for one that cannot be trained this way, and UserError where
        ranks have different ones."""
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise SchemaError(
                "FullyShardedDataParallel flattens the parameters that a run knows by name: "
                "use torch.distributed.fsdp.fully_shard, or DistributedDataParallel"
            )
        self.control = control
        self._is_first = control.rank == 0
        self._asked_for: Future[bytes] | None = None
        _reshard(model)
        super().__init__(model)

    @torch.no_grad()
    def _begin(self) -> None:
        self._parts = [
            Sharded(parameter) if isinstance(parameter, DTensor) else Whole(parameter, self._is_first)
            for parameter in self._parameters
        ]
        self.is_sharded = any(isinstance(part, Sharded) for part in self._parts)
        self._buffers = LocalBuffers(self._model, self.schema.buffers)
        theirs = Schema.from_bytes(self.control.share(self.schema.to_bytes()))
        self.control.require_none(difference(theirs, self.schema, "rank 0's"))

    @property
    def described(self) -> str:
        return f"{self.control.size} × {super().described}"

    # --- what a run begins with ---

    def initial_upload(self) -> bytes:
        """In the background; the training's thread has `gather` called until then."""
        self._asked_for = Future()
        return self._asked_for.result()

    @property
    def is_asked_for(self) -> bool:
        return self._asked_for is not None and not self._asked_for.done()

    @torch.no_grad()
    def gather(self) -> None:
        """Fulfil `initial_upload`."""
        self._announce(Kind.GATHER)
        flat = self._flattened(torch.device("cpu"), (whole(part.parameter) for part in self._parts))
        constants: dict[str, torch.Tensor] = {}
        for name, value in self._constants():
            content = whole(value.detach())
            if self._is_first:
                constants[name] = content.cpu().contiguous().clone()
        if self._asked_for is not None:
            self._asked_for.set_result(pack_parts(encode_payload("fp32", flat), safetensors.torch.save(constants)))

    # --- rounds ---

    @torch.no_grad()
    def cut(self) -> torch.Tensor:
        """On rank 0 the delta, as of a Replica."""
        self._announce(Kind.CUT)
        _reshard(self._model)
        self._check_model()
        self._check_strayed()
        place = torch.device("cpu") if self.is_sharded else self.device
        return self._flattened(place, (part.cut() for part in self._parts))

    @torch.no_grad()
    def adopt(self, target: object, buffers: object = ()) -> None:
        self._announce(Kind.ADOPT)
        if self._is_first:
            self._buffers.adopt(values_of(buffers))
        self._spread_buffers()
        for part, new in self._targets(target):
            part.adopt(new)
        _reshard(self._model)

    @torch.no_grad()
    def reset(self, target: object, buffers: object = ()) -> None:
        self._announce(Kind.RESET)
        if self._is_first:
            self._buffers.reset(values_of(buffers))
        self._spread_buffers()
        for part, new in self._targets(target):
            part.reset(new)
        _reshard(self._model)

    # --- a probe ---

    @contextlib.contextmanager
    def showing(self, flat: object, buffers: object = ()) -> Iterator[None]:
        self._announce(Kind.SHOWN)
        own = [part.local.detach().clone() for part in self._parts]
        with torch.no_grad():
            for part, new in self._targets(flat):
                part.put(new)
        _reshard(self._model)
        try:
            with self._buffers.showing(values_of(buffers)):
                yield
        finally:
            _reshard(self._model)
            with torch.no_grad():
                for part, value in zip(self._parts, own, strict=True):
                    part.local.copy_(value)

    @contextlib.contextmanager
    def calling(self, flat: object, buffers: object = ()) -> Iterator[Call]:
        """No collective: rank 0 has all of the parameters, and lends each layer its own for the call.

        A layer with parameters in parts that are not trained cannot be called.
        """
        lent = {id(part.parameter): new for part, new in self._targets(flat) if new is not None}

        def call(layer: torch.nn.Module, given: Sequence[torch.Tensor]) -> object:
            own = [(name, parameter) for name, parameter in layer.named_parameters() if id(parameter) in lent]
            whole = {name: lent[id(parameter)].to(self.device, parameter.dtype) for name, parameter in own}
            with _unhooked(layer):
                return torch.func.functional_call(layer, whole, tuple(given))

        with self._buffers.showing(values_of(buffers)):
            yield call

    def _spread_buffers(self) -> None:
        """Rank 0's: only what its own batches have shown travels, as DistributedDataParallel has it."""
        for index in range(len(self.schema.buffers)):
            numbers = self._buffers.numbers(index).to(self.device).contiguous()
            torch.distributed.broadcast(numbers, 0)
            if not self._is_first:
                self._buffers.put(index, numbers)

    def _announce(self, kind: Kind) -> None:
        if self._is_first:
            self.control.say(Said(kind=kind))

    def _flattened(self, place: torch.device, gathered: Iterator[torch.Tensor]) -> torch.Tensor:
        """One after another into a flat vector, which rank 0 alone has."""
        flat = torch.empty(self.schema.numel if self._is_first else 0, device=place)
        start = 0
        for content in gathered:
            if self._is_first:
                flat[start : start + content.numel()].copy_(content.reshape(-1))
                start += content.numel()
        return flat

    def _targets(self, target: object) -> Iterator[tuple[Whole | Sharded, torch.Tensor | None]]:
        start = 0
        for part in self._parts:
            stop = start + part.parameter.numel()
            yield part, target[start:stop].view(part.parameter.shape) if isinstance(target, torch.Tensor) else None
            start = stop

    def _check_strayed(self) -> None:
        """Raises UserError, on every rank, where a rank trains for itself: its steps would come to nothing."""
        compared = [part.compared() for part in self._parts if isinstance(part, Whole)]
        if not compared or self.control.size == 1:
            return
        everybody = self.control.gathered(torch.cat(compared, dim=1).cpu())
        local, progress = everybody[0]
        for rank, (theirs, _) in enumerate(everybody):
            if torch.dist(theirs, local) > STRAYED_SHARE * progress.norm():
                raise UserError(
                    f"rank {rank} has other parameters than rank 0 after a round: average the gradients of all ranks "
                    "before each step, as DistributedDataParallel and fully_shard do"
                )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of it, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _reshard(model: torch.nn.Module) -> None:
    """Forget what a forward pass has gathered: it would be used once more, however its parts have moved."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def _unhooked(layer: torch.nn.Module) -> Iterator[None]:
    """In here, nothing gathers for a call what lies in parts."""
    own = layer._forward_pre_hooks, layer._forward_hooks
    if any(isinstance(parameter, DTensor) for parameter in layer.parameters()):
        layer._forward_pre_hooks, layer._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        layer._forward_pre_hooks, layer._forward_hooks = own


def _some_of(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.reshape(-1)
    return flat[:: max(1, flat.numel() // COMPARED)][:COMPARED].float()
