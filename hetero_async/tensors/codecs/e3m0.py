"""e3m0: absmax blocks of 64, values ±s · 2^−k or zero. 4.5 bits a parameter.

Four bits whose three are an exponent: finer than int4 close to zero, coarser at the top, so better where a few values
tower above their block (Streaming DiLoCo: Douillard et al. 2025, arXiv 2501.18512, sends these).
"""

import torch

from hetero_async.tensors.codecs.codec import BLOCK, BlockCodec, absmax, nibbles, packed_nibbles

# Code 0 is zero, code k is 2^(k−7); the sign is bit 3.
LARGEST, SIGN = 7, 8
# fp32: 23 bits of mantissa, an exponent offset by 127, a sign.
MANTISSA_BITS, BIAS = 23, 127
# From here on an element is code 1, from twice as much code 2, and so on: half-way between two powers, as log₂ counts.
FIRST = 2.0**-6.5


class E3m0(BlockCodec):
    name = "e3m0"
    head_bytes = 4
    code_bytes = BLOCK // 2

    def coded(self, blocks: torch.Tensor, numel: int) -> tuple[torch.Tensor, torch.Tensor]:
        scales, divisors = absmax(blocks)
        # The bits of positive floats are in the floats' order, and twice as much is one more in the exponent.
        bits = blocks.abs().div_(divisors[:, None]).view(torch.int32)
        first = torch.tensor(FIRST).view(torch.int32).item()
        codes = bits.sub_(first).bitwise_right_shift_(MANTISSA_BITS).add_(1).clamp_(0, LARGEST).to(torch.int8)
        signs = ((blocks < 0) & (codes > 0)).to(torch.int8)
        return scales, packed_nibbles(codes.add_(signs.mul_(SIGN)))

    def restored(self, heads: torch.Tensor, codes: torch.Tensor, out: torch.Tensor) -> None:
        signed = nibbles(codes).to(torch.int32)
        sizes = signed & LARGEST
        # A zero has no sign, whoever coded it.
        is_some = sizes > 0
        bits = sizes.add_(BIAS - LARGEST).bitwise_left_shift_(MANTISSA_BITS)
        bits.bitwise_or_(signed.bitwise_and_(SIGN).bitwise_left_shift_(31 - 3)).mul_(is_some)
        torch.mul(bits.view(torch.float32).view(-1, BLOCK), heads.view(torch.float32)[:, None], out=out)
