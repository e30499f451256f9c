"""What every codec promises, and the pieces that several of them share.

A codec turns a flat fp32 vector into bytes of a size that only the vector's length decides, and decodes any stretch of
it that starts at a block, so that a merge never needs a whole decoded delta. Only operations that round once are used
(multiply, divide, round, absolute maximum), each elementwise: the server's own publish goes through a codec and is
replayed from the log, where it must come out the same on any CPU and with any number of threads.
"""

from collections.abc import Iterator

import torch

# Elements that share a scale (the study behind int4: blocks of 64 lose least at half a bit of overhead).
BLOCK = 64
# Elements coded at a time: what is in between stays in a core's cache, or keeps an accelerator busy in little memory.
PIECE, PIECE_ON_DEVICE = 2048 * BLOCK, 65_536 * BLOCK
# Words of so many bytes, seen as whole numbers.
WORDS = {2: torch.int16, 4: torch.int32}


class Codec:
    name: str

    def raw_bytes(self, numel: int) -> int:
        """Bytes of the coded vector before compression."""
        raise NotImplementedError

    def code(self, piece: torch.Tensor, numel: int, start: int, raw: torch.Tensor) -> None:
        """Write elements start … start + len(piece) − 1 of a vector of `numel` into its coded bytes `raw`.

        `piece` is fp32, on the device of `raw`, and only read; `start` is a multiple of PIECE.
        """
        raise NotImplementedError

    def check(self, raw: torch.Tensor, numel: int) -> None:
        """Raises PeerError for bytes, of the right number, that are no coded vector; there may be none."""

    def decode(self, raw: torch.Tensor, numel: int, start: int, out: torch.Tensor) -> None:
        """Write elements start … start + len(out) − 1 of the vector of `numel` into `out` (fp32).

        `start` is a multiple of BLOCK.
        """
        raise NotImplementedError

    def encode(self, flat: torch.Tensor) -> torch.Tensor:
        """Flat fp32, any device → uint8 [raw_bytes], same device."""
        numel = flat.numel()
        raw = torch.empty(self.raw_bytes(numel), dtype=torch.uint8, device=flat.device)
        for start, piece in pieces(flat):
            self.code(piece, numel, start, raw)
        return raw


class BlockCodec(Codec):
    """Each block by itself. Raw: of every block a head (its scale), then of every block its codes."""

    head_bytes: int
    code_bytes: int

    def coded(self, blocks: torch.Tensor, numel: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Heads and codes of some blocks (fp32 [blocks, BLOCK]), filled up with zeros behind `numel` elements."""
        raise NotImplementedError

    def restored(self, heads: torch.Tensor, codes: torch.Tensor, out: torch.Tensor) -> None:
        """`heads` and `codes` (uint8) of whole blocks; `out`: fp32 [blocks, BLOCK]."""
        raise NotImplementedError

    def raw_bytes(self, numel: int) -> int:
        return (self.head_bytes + self.code_bytes) * block_count(numel)

    def code(self, piece: torch.Tensor, numel: int, start: int, raw: torch.Tensor) -> None:
        heads, codes = self._stretch(raw, numel, start, piece.numel())
        some_heads, some_codes = self.coded(padded_blocks(piece), piece.numel())
        heads.copy_(as_bytes(some_heads))
        codes.copy_(as_bytes(some_codes))

    def decode(self, raw: torch.Tensor, numel: int, start: int, out: torch.Tensor) -> None:
        for first, piece in pieces(out):
            heads, codes = self._stretch(raw, numel, start + first, piece.numel())
            missing = -piece.numel() % BLOCK
            whole = torch.empty(piece.numel() + missing) if missing else piece
            self.restored(heads, codes, whole.view(-1, BLOCK))
            if missing:
                piece.copy_(whole[: piece.numel()])

    def _stretch(self, raw: torch.Tensor, numel: int, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Heads and codes of the blocks that hold `count` elements from `start` on."""
        split, first, blocks = self.head_bytes * block_count(numel), start // BLOCK, block_count(count)
        heads, codes = raw[:split], raw[split:]
        return (
            heads[first * self.head_bytes :][: blocks * self.head_bytes],
            codes[first * self.code_bytes :][: blocks * self.code_bytes],
        )


def pieces(flat: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(start, stretch), one after the other."""
    size = PIECE if flat.device.type == "cpu" else PIECE_ON_DEVICE
    return ((start, flat[start : start + size]) for start in range(0, flat.numel(), size))


def block_count(numel: int) -> int:
    return -(-numel // BLOCK)


def padded_blocks(flat: torch.Tensor) -> torch.Tensor:
    """[blocks, BLOCK], the last one filled up with zeros. The vector's own memory where nothing is to be filled up."""
    missing = block_count(flat.numel()) * BLOCK - flat.numel()
    return (torch.nn.functional.pad(flat, (0, missing)) if missing else flat).view(-1, BLOCK)


def absmax(blocks: torch.Tensor, levels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales s = max|x| / levels [blocks], and the same without the zeros, to divide by."""
    # By a tensor: CUDA divides by a plain number by multiplying with its reciprocal, which rounds twice.
    scales = blocks.abs().amax(dim=1).div_(torch.tensor(float(levels), device=blocks.device))
    return scales, torch.where(scales > 0, scales, 1.0)


def quantized(blocks: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales [blocks] and whole numbers (int8, like `blocks`): q = round(x / s) within ±levels, s = max|x| / levels."""
    scales, divisors = absmax(blocks, levels)
    return scales, blocks.div(divisors[:, None]).round_().clamp_(-levels, levels).to(torch.int8)


def packed_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes of four bits (int8, an even number of them), two a byte, the first one low: uint8."""
    pairs = as_bytes(codes).view(torch.int16)  # low byte first, on all machines that torch runs on
    return (pairs >> 4).bitwise_or_(pairs).to(torch.uint8)


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """int8, two of each byte."""
    pairs = packed.to(torch.int16)
    return (pairs << 4).bitwise_or_(pairs).bitwise_and_(0x0F0F).view(torch.int8)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def put_planes(words: torch.Tensor, raw: torch.Tensor, start: int) -> None:
    """Words of two bytes or four into `raw`, uint8 [width, words]: first a plane of all lowest bytes, then the next.

    Exponents lie side by side there, and compress.
    """
    numbers = words.contiguous().view(WORDS[len(raw)])
    for place, plane in enumerate(raw):
        plane[start : start + numbers.numel()] = numbers >> 8 * place


def from_planes(raw: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """`count` words from word `start` on, as whole numbers."""
    stretch = raw[:, start : start + count]
    words: torch.Tensor = stretch[0].to(WORDS[len(raw)])
    for place in range(1, len(raw)):
        words.bitwise_or_(stretch[place].to(words.dtype).bitwise_left_shift_(8 * place))
    return words
