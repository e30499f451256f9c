"""int8: absmax blocks of 64. Raw: one fp32 scale a block, then one byte an element. 8.5 bits a parameter."""

import torch

from hetero_async.tensors.codecs.codec import BLOCK, Codec, block_count, dequantized, quantized

LEVELS = 127
# Elements coded at a time: few enough to need little memory, enough to keep an accelerator busy.
PIECE = 16_384 * BLOCK


class Int8(Codec):
    name = "int8"

    def raw_bytes(self, numel: int) -> int:
        return 4 * block_count(numel) + numel

    def encode(self, flat: torch.Tensor) -> torch.Tensor:
        numel = flat.numel()
        raw = torch.empty(self.raw_bytes(numel), dtype=torch.uint8, device=flat.device)
        split = 4 * block_count(numel)
        for start in range(0, numel, PIECE):  # the fp32 in between are as large as the vector, and there are several
            stop = min(start + PIECE, numel)
            scales, numbers = quantized(flat[start:stop], LEVELS)
            raw[:split].view(torch.float32)[start // BLOCK :][: scales.numel()] = scales
            raw[split + start : split + stop].view(torch.int8).copy_(numbers.view(-1)[: stop - start])
        return raw

    def decode(self, raw: torch.Tensor, numel: int, start: int, out: torch.Tensor) -> None:
        split = 4 * block_count(numel)
        scales = raw[:split].view(torch.float32)[start // BLOCK :]
        dequantized(scales, raw[split:][start : start + out.numel()].view(torch.int8), out)
