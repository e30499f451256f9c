"""The inner optimizer's state as bytes, so that a worker that is started again goes on with it.

Tensors and numbers only, as safetensors: nothing that was read is ever executed. Hyperparameters are not in it: they
are the script's.
"""

import json
from collections.abc import Callable, Iterator

import safetensors.torch
import torch
from safetensors import SafetensorError

from hetero_async.errors import PeerError

ABOUT = "about"

# (tensor, parameter) → the tensor, or where parameters are in parts this process's part of it; and the way back
Part = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None]


def itself(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    return tensor


def packed(optimizer: torch.optim.Optimizer, moment: int = 0, part: Part = itself) -> dict[str, torch.Tensor]:
    """A copy on the CPU: `INDEX/NAME` of every parameter's state, in the order of the parameter groups.

    Called between two steps; what comes back is its taker's own. Empty where a state is no tensor or number, or has no
    part that is this process's. `moment` tells copies apart.
    """
    tensors: dict[str, torch.Tensor] = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, torch.Tensor | int | float):
                return {}
            own = part(torch.as_tensor(value), parameter)
            if own is None:
                return {}
            tensors[f"{index}/{name}"] = own.detach().to("cpu", copy=True).contiguous()
    about = json.dumps({"optimizer": type(optimizer).__name__, "moment": moment}).encode()
    return tensors | {ABOUT: torch.frombuffer(bytearray(about), dtype=torch.uint8)} if tensors else {}


def to_bytes(tensors: dict[str, torch.Tensor]) -> bytes:
    return safetensors.torch.save(tensors)


def restore(optimizer: torch.optim.Optimizer, content: bytes, part: Part = itself, joined: Part = itself) -> int:
    """Give the optimizer its state back; returns the moment that it is of. `joined` makes of a part what `part` was
    given. Raises PeerError, and changes nothing, where it is another optimizer's."""
    tensors = _tensors(content)
    kind, moment = _about(tensors.pop(ABOUT, None))
    if kind != type(optimizer).__name__:
        raise PeerError(f"it is of {kind}, and the optimizer is {type(optimizer).__name__}")
    parameters = _parameters(optimizer)
    found: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition("/")
        if not index.isdigit() or int(index) >= len(parameters):
            raise PeerError(f"it has a state of parameter {index}, and the optimizer has {len(parameters)} parameters")
        parameter = parameters[int(index)]
        own = part(parameter, parameter)
        assert own is not None, "a parameter always has its own part"
        if not _fits(value.shape, own.shape):
            shapes = f"{tuple(value.shape)}, and the parameter is {tuple(own.shape)}"
            raise PeerError(f"its {name} of parameter {index} is {shapes}")
        # Counters stay where optimizers keep them, on the CPU, unless they are asked to be capturable.
        device = parameter.device if value.dim() or _is_capturable(optimizer) else value.device
        whole = joined(value.to(device), parameter)
        assert whole is not None
        found.setdefault(parameter, {})[name] = whole
    for parameter, state in found.items():
        optimizer.state[parameter] = state
    return moment


def _fits(state: torch.Size, parameter: torch.Size) -> bool:
    """Factored optimizers keep a row and a column; a counter has no dimension at all."""
    pairs = zip(reversed(state), reversed(parameter), strict=False)
    return len(state) <= len(parameter) and all(size in (1, whole) for size, whole in pairs)


def _tensors(content: bytes) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, KeyError) as error:
        raise PeerError(f"not an optimizer's state: {error}") from error


def _about(about: torch.Tensor | None) -> tuple[str, int]:
    try:
        told = json.loads(bytes(about.tolist())) if about is not None else {"optimizer": "nothing known"}
        return str(told["optimizer"]), int(told.get("moment", 0))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PeerError(f"not an optimizer's state: {error}") from error


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return list(_each(optimizer))


def _each(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _is_capturable(optimizer: torch.optim.Optimizer) -> bool:
    return any(group.get("capturable") or group.get("fused") for group in optimizer.param_groups)
