"""2bit: per block of 64 two magnitudes (bf16), per element its sign and which of them. 2.5 bits a parameter.

Too coarse to be used without error feedback, with which little is lost.
"""

import torch

from hetero_async.tensors.codecs.codec import BLOCK, Codec, as_bytes, block_count, padded_blocks
from hetero_async.tensors.codecs.magnitudes import LEVEL_BYTES, LEVELS, crumbs, packed_crumbs, restored, two_magnitudes

# Where Gaussian values are best cut in two, as a multiple of their mean magnitude: 0.9816 σ (Max 1960, table I, N = 4).
CUT = 1.23


class TwoBit(Codec):
    name = "2bit"

    def raw_bytes(self, numel: int) -> int:
        return (LEVELS * LEVEL_BYTES + BLOCK // 4) * block_count(numel)

    def encode(self, flat: torch.Tensor) -> torch.Tensor:
        blocks = padded_blocks(flat)
        counts = torch.full((len(blocks), 1), float(BLOCK), device=flat.device)
        if rest := flat.numel() % BLOCK:
            counts[-1] = rest
        levels, codes = two_magnitudes(blocks, counts, CUT)
        return torch.cat([as_bytes(levels), packed_crumbs(codes)])

    def decode(self, raw: torch.Tensor, numel: int, start: int, out: torch.Tensor) -> None:
        split = LEVELS * LEVEL_BYTES * block_count(numel)
        first, blocks = start // BLOCK, block_count(out.numel())
        levels = raw[:split].view(torch.bfloat16).view(-1, LEVELS)[first : first + blocks]
        codes = crumbs(raw[split:][first * BLOCK // 4 :][: blocks * BLOCK // 4]).view(blocks, BLOCK)
        out.copy_(restored(levels, codes).view(-1)[: out.numel()])
