"""Two bits an element: its sign, and which of its row's two magnitudes.

The magnitudes are the means of those that they stand for. So the error is smaller than the vector, whatever the vector
is: |x − D(C(x))|² = |x|² − Σ n·mean², the condition under which error feedback loses nothing (Karimireddy et al. 2019,
arXiv 1901.09847, assumption A).
"""

import torch

from hetero_async.tensors.codecs.codec import as_bytes

LEVELS, LEVEL_BYTES = 2, 2  # bf16
NEGATIVE, LARGE = 1, 2


def two_magnitudes(rows: torch.Tensor, counts: torch.Tensor, cut: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels (bf16 [rows, 2]: small, large) and codes (uint8 [rows, width]).

    `rows`: fp32 [rows, width], width a power of two, filled up with zeros behind the first `counts` ([rows]) of each.
    `cut`: from this multiple of its row's mean magnitude on, an element is large.
    """
    sizes = rows.abs().t().contiguous()  # by columns: sums over a row are sums of long vectors then
    is_large = sizes >= _sum(sizes).div_(counts).mul_(cut)
    large = is_large.float()
    large_counts = _sum(large)
    large.mul_(sizes)
    members = torch.stack([counts - large_counts, large_counts], dim=1)
    sums = torch.stack([_sum(sizes.sub_(large)), _sum(large)], dim=1)
    levels = sums.div_(torch.where(members > 0, members, 1.0)).to(torch.bfloat16)
    codes = is_large.t().contiguous().view(torch.uint8).mul_(LARGE)
    return levels, codes.add_(rows < 0, alpha=NEGATIVE)


def restored(levels: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """fp32 [rows, width]."""
    small, large = levels.float().view(torch.int32).split(1, dim=1)
    words = codes.to(torch.int32)
    # Without a branch: small ⊕ (small ⊕ large), the latter where the code says so, and the sign in its place.
    bits = (words >> 1).neg_().bitwise_and_(small ^ large).bitwise_xor_(small)
    return bits.bitwise_or_(words.bitwise_left_shift_(31)).view(torch.float32)


def packed_crumbs(codes: torch.Tensor) -> torch.Tensor:
    """Codes of two bits (uint8, four times as many as bytes come of them), the first one lowest."""
    fours = as_bytes(codes).view(torch.int32)  # lowest byte first, on all machines that torch runs on
    packed = fours >> 18
    for shift in (12, 6, 0):
        packed.bitwise_or_(fours >> shift)
    return packed.to(torch.uint8)


def crumbs(packed: torch.Tensor) -> torch.Tensor:
    """uint8, four of each byte."""
    words = packed.to(torch.int32)
    fours = words << 18
    for shift in (12, 6, 0):
        fours.bitwise_or_(words << shift)
    return fours.bitwise_and_(0x03030303).view(torch.uint8)


def _sum(columns: torch.Tensor) -> torch.Tensor:
    """Over dimension 0, a power of two long. By halves, each an elementwise sum: torch's own order depends on the CPU,
    and so do its last bits."""
    while (height := columns.shape[0]) > 1:
        columns = columns[: height // 2] + columns[height // 2 :]
    return columns[0]
