"""What every codec promises, and the pieces that several of them share.

A codec turns a flat fp32 vector into bytes of a size that only the vector's length decides, and decodes any stretch of
it that starts at a block, so that a merge never needs a whole decoded delta. Only operations that round once are used
(multiply, divide, round, absolute maximum), each elementwise: the server's own publish goes through a codec and is
replayed from the log, where it must come out the same on any CPU and with any number of threads.
"""

from typing import Protocol

import torch

# Elements that share a scale (the study behind int4: blocks of 64 lose least at half a bit of overhead).
BLOCK = 64


class Codec(Protocol):
    name: str

    def raw_bytes(self, numel: int) -> int:
        """Bytes of the coded vector before compression."""
        ...

    def encode(self, flat: torch.Tensor) -> torch.Tensor:
        """Flat fp32, any device → uint8 [raw_bytes], same device."""
        ...

    def check(self, raw: torch.Tensor, numel: int) -> None:
        """Raises PeerError for bytes, of the right number, that are no coded vector; there may be none."""
        return

    def decode(self, raw: torch.Tensor, numel: int, start: int, out: torch.Tensor) -> None:
        """Write elements start … start + len(out) − 1 of the vector of `numel` into `out` (fp32).

        `start` is a multiple of BLOCK.
        """
        ...


def block_count(numel: int) -> int:
    return -(-numel // BLOCK)


def padded_blocks(flat: torch.Tensor) -> torch.Tensor:
    """[blocks, BLOCK], the last one filled up with zeros."""
    missing = block_count(flat.numel()) * BLOCK - flat.numel()
    return torch.nn.functional.pad(flat, (0, missing)).view(-1, BLOCK)


def absmax(blocks: torch.Tensor, levels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales s = max|x| / levels [blocks], and the same without the zeros, to divide by."""
    # By a tensor: CUDA divides by a plain number by multiplying with its reciprocal, which rounds twice.
    scales = blocks.abs().amax(dim=1).div_(torch.tensor(float(levels), device=blocks.device))
    return scales, torch.where(scales > 0, scales, 1.0)


def quantized(flat: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales [blocks] and whole numbers [blocks, BLOCK] within ±levels: q = round(x / s), s = max|x| / levels."""
    blocks = padded_blocks(flat)
    scales, divisors = absmax(blocks, levels)
    return scales, blocks.div(divisors[:, None]).round_().clamp_(-levels, levels)


def dequantized(scales: torch.Tensor, numbers: torch.Tensor, out: torch.Tensor) -> None:
    """x = q · s for whole blocks and a last partial one."""
    whole = out.numel() // BLOCK
    torch.mul(
        numbers[: whole * BLOCK].view(whole, BLOCK), scales[:whole, None], out=out[: whole * BLOCK].view(whole, BLOCK)
    )
    if rest := out.numel() - whole * BLOCK:
        torch.mul(numbers[whole * BLOCK :][:rest], scales[whole], out=out[whole * BLOCK :])


def packed_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes of four bits, two a byte; their number is even."""
    return codes[0::2] | (codes[1::2] << 4)


def nibbles(packed: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """`count` codes from an even `start` on."""
    stretch = packed[start // 2 : (start + count + 1) // 2]
    return torch.stack([stretch & 15, stretch >> 4], dim=1).view(-1)[:count]


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def planes(words: torch.Tensor, width: int) -> torch.Tensor:
    """Byte planes: all lowest bytes first, the highest last. Exponents lie side by side and compress."""
    return as_bytes(words).view(-1, width).t().contiguous().view(-1)


def from_planes(raw: torch.Tensor, width: int, start: int, count: int) -> torch.Tensor:
    """The bytes of `count` words from word `start` on, in order."""
    return raw.view(width, -1)[:, start : start + count].t().contiguous().view(-1)
