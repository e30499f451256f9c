"""fp32: exact, as four byte planes."""

import torch

from hetero_async.tensors.codecs.codec import Codec, from_planes, pieces, put_planes

WIDTH = 4


class Fp32(Codec):
    name = "fp32"

    def raw_bytes(self, numel: int) -> int:
        return WIDTH * numel

    def code(self, piece: torch.Tensor, numel: int, start: int, raw: torch.Tensor) -> None:
        put_planes(piece, raw.view(WIDTH, numel), start)

    def decode(self, raw: torch.Tensor, numel: int, start: int, out: torch.Tensor) -> None:
        for first, piece in pieces(out):
            piece.copy_(from_planes(raw.view(WIDTH, numel), start + first, piece.numel()).view(torch.float32))
