"""e3m0: absmax blocks of 64, values ±s · 2^−k or zero. 4.5 bits a parameter.

Four bits whose three are an exponent: finer than int4 close to zero, coarser at the top, so better where a few values
tower above their block (Streaming DiLoCo: Douillard et al. 2025, arXiv 2501.18512, sends these).
"""

import torch

from hetero_async.tensors.codecs.codec import (
    BLOCK,
    Codec,
    absmax,
    as_bytes,
    block_count,
    dequantized,
    nibbles,
    packed_nibbles,
    padded_blocks,
)

# Code 0 is zero, code k is 2^(k−7); the sign is bit 3.
SIZES = (0.0, *(2.0**-power for power in range(6, -1, -1)))
# Half-way between two powers, as log₂ counts; below the first everything is zero.
BOUNDS = tuple(2.0 ** (-power - 0.5) for power in range(6, -1, -1))
SIGN = 8


class E3m0(Codec):
    name = "e3m0"

    def raw_bytes(self, numel: int) -> int:
        return (4 + BLOCK // 2) * block_count(numel)

    def encode(self, flat: torch.Tensor) -> torch.Tensor:
        blocks = padded_blocks(flat)
        scales, divisors = absmax(blocks)
        shares = blocks.abs().div_(divisors[:, None])
        codes = torch.bucketize(shares, torch.tensor(BOUNDS, device=flat.device), right=True, out_int32=True)
        signs = (blocks < 0) & (codes > 0)
        return torch.cat([as_bytes(scales), packed_nibbles((codes + SIGN * signs).to(torch.uint8).view(-1))])

    def decode(self, raw: torch.Tensor, numel: int, start: int, out: torch.Tensor) -> None:
        split = 4 * block_count(numel)
        values = torch.tensor([*SIZES, *(-size for size in SIZES)])
        values[SIGN] = 0.0  # a zero has no sign, whoever coded it
        dequantized(
            raw[:split].view(torch.float32)[start // BLOCK :],
            values[nibbles(raw[split:], start, out.numel()).to(torch.int32)],
            out,
        )
