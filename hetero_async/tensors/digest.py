"""What the layers of a model answer to a given input, as a few figures each that tell other arithmetic from rounding.

Each output y (all floating tensors of it, one after another, as fp64 on the CPU) becomes its root mean square
r = √(Σ yᵢ² / n) and K projections pₖ = Σ sₖᵢ yᵢ / √n by signs that are the same everywhere. Whatever the difference of
two outputs is, that of their pₖ has its mean square, so their figures tell how far apart they are (core/probing.py). Of
more values than SAMPLED_MAX evenly spaced ones are taken.

Inputs and signs are bits of SHAKE-128, which a standard has fixed (FIPS 202), not a library's version. The values of
inputs are multiples of 1/64 below 2, so every dtype that models are trained in has them exactly.
"""

import functools
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.modules import activation, batchnorm, conv, instancenorm
from torch.nn.modules.rnn import RNNBase

from hetero_async.core.probe import BATCH, LAYERS, LAYERS_MAX, NAME_LENGTH_MAX, PROJECTIONS, TOLERANCES, Digest
from hetero_async.tensors.devices import REFUSALS
from hetero_async.tensors.replica import Call

SAMPLED_MAX = 1 << 16
# Bits of a value that a product must keep to be exact to that many; fp32 has 23 behind the point, TF32 10, bf16 7.
FP32_BITS, TF32_BITS = 20, 9
HALVES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
WHOLE = "(output)"
# What a model's code, or torch's, raises for an input that it cannot take.
FAILURES = (*REFUSALS, ArithmeticError, ImportError, LookupError, NameError, OSError, ValueError)


def of_batch(model: nn.Module, batch: Any, device: torch.device, dtype: torch.dtype) -> Digest:
    """Of every layer that runs when the model is called with the batch: a tensor, or a tuple or dict of arguments.

    Its floating tensors are given in `dtype`; where layers answer in a coarser one, that is the arithmetic. Raises what
    the model raises.
    """
    figures: list[tuple[str, tuple[float, ...]]] = []
    seen: dict[str, int] = {}
    arithmetic = {arithmetic_of(model, device, dtype): True}

    def note(name: str, output: object) -> None:
        arithmetic.update((HALVES[part.dtype], True) for part in _tensors(output) if part.dtype in HALVES)
        seen[name] = seen.get(name, 0) + 1  # one layer may run several times
        if found := figures_of(output):
            figures.append((_short(name if seen[name] == 1 else f"{name}#{seen[name]}"), found))

    handles = [
        layer.register_forward_hook(lambda _, __, output, name=name: note(name, output))
        for name, layer in model.named_modules()
        if name and next(layer.children(), None) is None
    ]
    try:
        given = placed(batch, device, dtype)
        if isinstance(given, Mapping):
            output = model(**given)
        else:
            output = model(*given) if isinstance(given, list | tuple) else model(given)
    finally:
        for handle in handles:
            handle.remove()
    note(WHOLE, output)
    return _digest(BATCH, hash_of_input(batch), max(arithmetic, key=TOLERANCES.__getitem__), figures)


def of_layers(model: nn.Module, device: torch.device, dtype: torch.dtype, call: Call) -> Digest:
    """Of each of torch's own layers by itself, on an input of its shape.

    What lies between them is not looked at, nor is a layer that does not take its input. `call` calls one.
    """
    figures = []
    for name, layer in model.named_modules():
        given = inputs_of(layer)
        if given is None:
            continue
        try:
            found = figures_of(call(layer, placed(given, device, dtype)))
        except FAILURES:
            continue
        if found:
            figures.append((_short(name or WHOLE), found))
    return _digest(LAYERS, "", arithmetic_of(model, device, dtype), figures)


def _digest(kind: str, given: str, arithmetic: str, figures: list[tuple[str, tuple[float, ...]]]) -> Digest:
    count = min(len(figures), LAYERS_MAX)
    chosen = [figures[(number + 1) * len(figures) // count - 1] for number in range(count)]
    return Digest(
        kind=kind,
        input=given,
        arithmetic=arithmetic,
        executed=len(figures),
        layers=tuple(name for name, _ in chosen),
        figures=tuple(figure for _, found in chosen for figure in found),
    )


def _short(name: str) -> str:
    return name.encode("ascii", "backslashreplace").decode()[-NAME_LENGTH_MAX:]


# --- figures ---


def figures_of(output: object) -> tuple[float, ...]:
    """Empty for an output without any floating value. What is not finite counts as 0: elsewhere it may be a number."""
    parts = [part.detach().reshape(-1) for part in _tensors(output) if part.numel()]
    parts = [torch.view_as_real(part).reshape(-1) if part.is_complex() else part for part in parts]
    parts = [part for part in parts if part.is_floating_point()]
    stride = math.ceil(sum(map(len, parts)) / SAMPLED_MAX) if parts else 1
    sampled = [part[::stride].cpu().double() for part in parts]
    if not sampled:
        return ()
    values = torch.cat(sampled)[:SAMPLED_MAX].nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    scale = math.sqrt(len(values))
    projected = _signs()[:, : len(values)] @ values / scale
    return (float(values.norm()) / scale, *projected.tolist())


def _tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from (part for value in output.values() for part in _tensors(value))
    elif isinstance(output, list | tuple):
        yield from (part for value in output for part in _tensors(value))


@functools.cache
def _signs() -> Tensor:
    bits = numpy.unpackbits(_bytes("signs", PROJECTIONS * SAMPLED_MAX // 8))
    return torch.from_numpy(bits.reshape(PROJECTIONS, SAMPLED_MAX)).double() * 2 - 1


def _bytes(what: str, count: int) -> numpy.ndarray:
    return numpy.frombuffer(hashlib.shake_128(f"hetero_async {what}".encode()).digest(count), dtype=numpy.uint8)


# --- inputs ---


def inputs_of(layer: nn.Module) -> tuple[Tensor, ...] | None:
    """Of a shape that it takes; None where that cannot be known."""
    match layer:
        case nn.Linear():
            return (seeded(8, layer.in_features),)
        case nn.Bilinear():
            return seeded(8, layer.in1_features), seeded(8, layer.in2_features)
        case nn.Embedding() | nn.EmbeddingBag():
            numbers = torch.from_numpy(_bytes("numbers", 4 * 16).view("<u4").astype(numpy.int64))
            return (numbers.remainder(layer.num_embeddings).reshape(2, 8),)
        case conv._ConvNd():
            reach = [step * (size - 1) + 4 for step, size in zip(layer.dilation, layer.kernel_size, strict=True)]
            return (seeded(2, layer.in_channels, *reach),)
        case nn.LayerNorm() | nn.RMSNorm():
            return (seeded(4, *layer.normalized_shape),)
        case nn.GroupNorm():
            return (seeded(2, layer.num_channels, 8),)
        case batchnorm._NormBase():
            return (seeded(4, layer.num_features, *[4] * _dimensions(layer)),)
        case RNNBase():
            return (seeded(5, 2, layer.input_size),)
        case nn.PReLU():
            return (seeded(8, layer.num_parameters),)
        case nn.MultiheadAttention():
            return (seeded(5, 2, layer.embed_dim),) * 3 if layer._qkv_same_embed_dim else None
        case _:
            return (seeded(8, 64),) if type(layer).__module__ == activation.__name__ else None


def _dimensions(layer: nn.Module) -> int:
    if isinstance(layer, nn.BatchNorm1d):
        return 0
    three = nn.BatchNorm3d, instancenorm.InstanceNorm3d
    return 3 if isinstance(layer, three) else 1 if isinstance(layer, instancenorm.InstanceNorm1d) else 2


def seeded(*shape: int) -> Tensor:
    """fp32, evenly distributed over the multiples of 1/64 from −2 to below 2."""
    raw = _bytes("values", math.prod(shape)).view(numpy.int8).astype(numpy.float32) / 64
    return torch.from_numpy(raw).reshape(shape)


def placed(given: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The same, with its tensors on the device, floating ones in that dtype."""
    match given:
        case Tensor():
            return given.to(device, dtype) if given.is_floating_point() else given.to(device)
        case Mapping():
            return {name: placed(value, device, dtype) for name, value in given.items()}
        case list() | tuple():
            return [placed(value, device, dtype) for value in given]
        case _:
            return given


def hash_of_input(given: Any) -> str:
    """Of all tensors' shapes and values: floating ones as fp32, others as int64."""
    whole = hashlib.blake2b(digest_size=16)
    for tensor in _tensors(given):
        whole.update(f"{list(tensor.shape)}".encode())
        values = tensor.detach().cpu().to(torch.float32 if tensor.is_floating_point() else torch.int64)
        whole.update(values.contiguous().numpy().tobytes())
    return whole.hexdigest()


# --- arithmetic ---


def arithmetic_of(model: nn.Module, device: torch.device, dtype: torch.dtype) -> str:
    """fp16, bf16, or what products of fp32 come to on this device with the present settings: fp32, tf32 or bf16.

    It is tried; a device's name or torch's switches do not say what its kernels do.
    """
    if dtype in HALVES:
        return HALVES[dtype]
    has_convolutions = any(isinstance(module, conv._ConvNd | RNNBase) for module in model.modules())
    trials = [_product, *[_convolved] * has_convolutions]
    for name, bits in (("fp32", FP32_BITS), ("tf32", TF32_BITS)):
        if all(_is_kept(trial, bits, device) for trial in trials):
            return name
    return "bf16"


def _is_kept(trial: Any, bits: int, device: torch.device) -> bool:
    exact = 1 + 2.0**-bits
    try:
        return bool((trial(exact, device) == exact).all())
    except REFUSALS:
        return True  # it cannot do such a thing at all, and the model's own layers will say so


def _product(value: float, device: torch.device) -> Tensor:
    return torch.full((128, 128), value, device=device) @ torch.eye(128, device=device)


def _convolved(value: float, device: torch.device) -> Tensor:
    kernel = torch.zeros(64, 64, 3, 3, device=device)
    kernel[:, :, 1, 1] = torch.eye(64, device=device)
    return nn.functional.conv2d(torch.full((4, 64, 16, 16), value, device=device), kernel, padding=1)
