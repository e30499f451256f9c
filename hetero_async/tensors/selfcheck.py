"""Whether this host computes what every other one does: a fixed computation, and codecs on a device beside the CPU's.

The run's promise to be the same to the bit everywhere rests on this. `hetero-async doctor` asks.
"""

import torch
import xxhash

from hetero_async.tensors import outer
from hetero_async.tensors.codecs import CODECS
from hetero_async.tensors.devices import beside, to_host

# Enough for several blocks of every codec, and one that is not full.
NUMEL = 3 * 4096 + 37
STEPS = 5
COEFFICIENTS = (0.9, 0.1, 0.7, 0.63)  # of a step: decay, intake, gain, pull
POWERS = torch.tensor([2.0**exponent for exponent in range(-12, 4)])
# What `arithmetic` comes to where a product is rounded before it is added; found on x86-64 with torch 2.13.
DIGEST = "ccfd3301690a912b827f59ff7df52010"


def vector(seed: int) -> torch.Tensor:
    """Floats of many magnitudes, made of whole numbers: no random generator or library function takes part."""
    index = torch.arange(NUMEL, dtype=torch.int64) + (seed << 20)
    mixed = (index * 6364136223846793005 + 1442695040888963407) >> 33
    mantissa = (mixed & 0xFFFFFF).to(torch.float32) / 2**24 - 0.5
    return mantissa * POWERS[(mixed >> 24) & 0xF]


def arithmetic() -> str:
    """The digest of some outer steps, of deltas and publishes through every codec, as a server makes them."""
    theta, momentum, spare = vector(0), torch.zeros(NUMEL), torch.empty(NUMEL)
    whole = xxhash.xxh3_128()
    for number in range(STEPS):
        mean, decoded = torch.zeros(NUMEL), torch.empty(NUMEL)
        for place, codec in enumerate(CODECS.values()):
            raw = codec.encode(vector(100 * number + place))
            whole.update(raw.numpy().data)
            codec.decode(raw, NUMEL, 0, decoded)
            mean.add_(decoded.mul_(1 / len(CODECS)))
        outer.step(theta, [momentum], mean, spare, COEFFICIENTS)
    whole.update(theta.numpy().data)
    return whole.hexdigest()


def differing_codecs(device: torch.device) -> list[str]:
    """Those that code a vector otherwise on this device than on the CPU."""
    different = []
    for name, codec in CODECS.items():
        flat = vector(7)
        with beside(device):
            raw = to_host(codec.encode(flat.to(device)))
        if not torch.equal(raw, codec.encode(flat)):
            different.append(name)
    return different
