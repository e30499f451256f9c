"""int4: absmax blocks of 64. Raw: one fp32 scale a block, then two elements a byte, offset by 8. 4.5 bits each."""

import torch

from hetero_async.tensors.codecs.codec import (
    BLOCK,
    Codec,
    as_bytes,
    block_count,
    dequantized,
    nibbles,
    packed_nibbles,
    quantized,
)

LEVELS = 7
OFFSET = 8


class Int4(Codec):
    name = "int4"

    def raw_bytes(self, numel: int) -> int:
        return (4 + BLOCK // 2) * block_count(numel)

    def encode(self, flat: torch.Tensor) -> torch.Tensor:
        scales, numbers = quantized(flat, LEVELS)
        return torch.cat([as_bytes(scales), packed_nibbles(numbers.add_(OFFSET).to(torch.uint8).view(-1))])

    def decode(self, raw: torch.Tensor, numel: int, start: int, out: torch.Tensor) -> None:
        split = 4 * block_count(numel)
        scales = raw[:split].view(torch.float32)[start // BLOCK :]
        dequantized(scales, nibbles(raw[split:], start, out.numel()).to(torch.int8).sub_(OFFSET), out)
