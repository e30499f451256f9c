"""2bit: per block of 64 two magnitudes (bf16), per element its sign and which of them. 2.5 bits a parameter.

Too coarse to be used without error feedback, with which little is lost.
"""

import torch

from hetero_async.tensors.codecs.codec import BLOCK, BlockCodec
from hetero_async.tensors.codecs.magnitudes import LEVEL_BYTES, LEVELS, crumbs, packed_crumbs, restored, two_magnitudes

# Where Gaussian values are best cut in two, as a multiple of their mean magnitude: 0.9816 σ (Max 1960, table I, N = 4).
CUT = 1.23


class TwoBit(BlockCodec):
    name = "2bit"
    head_bytes = LEVELS * LEVEL_BYTES
    code_bytes = BLOCK // 4

    def coded(self, blocks: torch.Tensor, numel: int) -> tuple[torch.Tensor, torch.Tensor]:
        counts = torch.full((len(blocks),), float(BLOCK), device=blocks.device)
        counts[-1] -= blocks.numel() - numel
        levels, codes = two_magnitudes(blocks, counts, CUT)
        return levels, packed_crumbs(codes)

    def restored(self, heads: torch.Tensor, codes: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(restored(heads.view(torch.bfloat16).view(-1, LEVELS), crumbs(codes).view(-1, BLOCK)))
