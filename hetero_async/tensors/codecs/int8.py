"""int8: absmax blocks of 64. Raw: one fp32 scale a block, then one byte an element. 8.5 bits a parameter."""

import torch

from hetero_async.tensors.codecs.codec import BLOCK, BlockCodec, quantized

LEVELS = 127


class Int8(BlockCodec):
    name = "int8"
    head_bytes = 4
    code_bytes = BLOCK

    def coded(self, blocks: torch.Tensor, numel: int) -> tuple[torch.Tensor, torch.Tensor]:
        return quantized(blocks, LEVELS)

    def restored(self, heads: torch.Tensor, codes: torch.Tensor, out: torch.Tensor) -> None:
        torch.mul(codes.view(torch.int8).view(-1, BLOCK), heads.view(torch.float32)[:, None], out=out)
