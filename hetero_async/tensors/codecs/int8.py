"""int8: absmax blocks of 64. Raw: one fp32 scale a block, then one byte an element. 8.5 bits a parameter."""

import torch

from hetero_async.tensors.codecs.codec import BLOCK, as_bytes, block_count, dequantized, quantized

LEVELS = 127


class Int8:
    name = "int8"

    def raw_bytes(self, numel: int) -> int:
        return 4 * block_count(numel) + numel

    def encode(self, flat: torch.Tensor) -> torch.Tensor:
        scales, numbers = quantized(flat, LEVELS)
        return torch.cat([as_bytes(scales), as_bytes(numbers.to(torch.int8))[: flat.numel()]])

    def decode(self, raw: torch.Tensor, numel: int, start: int, out: torch.Tensor) -> None:
        split = 4 * block_count(numel)
        scales = raw[:split].view(torch.float32)[start // BLOCK :]
        dequantized(scales, raw[split:][start : start + out.numel()].view(torch.int8), out)
