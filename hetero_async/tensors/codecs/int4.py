"""int4: absmax blocks of 64. Raw: one fp32 scale a block, then two elements a byte, offset by 8. 4.5 bits each."""

import torch

from hetero_async.tensors.codecs.codec import BLOCK, BlockCodec, nibbles, packed_nibbles, quantized

LEVELS = 7
OFFSET = 8


class Int4(BlockCodec):
    name = "int4"
    head_bytes = 4
    code_bytes = BLOCK // 2

    def coded(self, blocks: torch.Tensor, numel: int) -> tuple[torch.Tensor, torch.Tensor]:
        scales, numbers = quantized(blocks, LEVELS)
        return scales, packed_nibbles(numbers.add_(OFFSET))

    def restored(self, heads: torch.Tensor, codes: torch.Tensor, out: torch.Tensor) -> None:
        torch.mul(nibbles(codes).sub_(OFFSET).view(-1, BLOCK), heads.view(torch.float32)[:, None], out=out)
