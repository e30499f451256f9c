"""bf16: rounded to nearest even, as two byte planes."""

import torch

from hetero_async.tensors.codecs.codec import Codec, from_planes, pieces, put_planes

WIDTH = 2


class Bf16(Codec):
    name = "bf16"

    def raw_bytes(self, numel: int) -> int:
        return WIDTH * numel

    def code(self, piece: torch.Tensor, numel: int, start: int, raw: torch.Tensor) -> None:
        put_planes(piece.to(torch.bfloat16), raw.view(WIDTH, numel), start)

    def decode(self, raw: torch.Tensor, numel: int, start: int, out: torch.Tensor) -> None:
        for first, piece in pieces(out):
            piece.copy_(from_planes(raw.view(WIDTH, numel), start + first, piece.numel()).view(torch.bfloat16))
