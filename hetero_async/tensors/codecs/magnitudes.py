"""Two bits an element: its sign, and which of its row's two magnitudes.

The magnitudes are the means of those that they stand for. So the error is smaller than the vector, whatever the vector
is: |x − D(C(x))|² = |x|² − Σ n·mean², the condition under which error feedback loses nothing (Karimireddy et al. 2019,
arXiv 1901.09847, assumption A).
"""

import torch

LEVELS, LEVEL_BYTES = 2, 2  # bf16
NEGATIVE, LARGE = 1, 2


def two_magnitudes(rows: torch.Tensor, counts: torch.Tensor, cut: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels (bf16 [rows, 2]: small, large) and codes (uint8 [rows, width]).

    `rows`: fp32 [rows, width], width a power of two, filled up with zeros behind the first `counts` ([rows, 1]) of
    each. `cut`: from this multiple of its row's mean magnitude on, an element is large.
    """
    sizes = rows.abs()
    is_large = sizes >= _sum(sizes).div(counts).mul_(cut)
    large = torch.where(is_large, sizes, 0.0)
    large_counts = _sum(is_large.float())
    small_counts = counts - large_counts
    sums = torch.cat([_sum(torch.where(is_large, 0.0, sizes)), _sum(large)], dim=1)
    members = torch.cat([small_counts, large_counts], dim=1)
    levels = sums.div_(torch.where(members > 0, members, 1.0)).to(torch.bfloat16)
    return levels, (is_large * LARGE + (rows < 0) * NEGATIVE).to(torch.uint8)


def restored(levels: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """fp32 [rows, width]."""
    small, large = levels.float().split(1, dim=1)
    sizes = torch.where(codes >= LARGE, large, small)
    return torch.where(codes % 2 == NEGATIVE, -sizes, sizes)


def packed_crumbs(codes: torch.Tensor) -> torch.Tensor:
    """Codes of two bits, four a byte; their number is a multiple of four."""
    a, b, c, d = codes.view(-1, 4).unbind(1)
    return a | (b << 2) | (c << 4) | (d << 6)


def crumbs(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack([packed & 3, packed >> 2 & 3, packed >> 4 & 3, packed >> 6], dim=1).view(-1)


def _sum(rows: torch.Tensor) -> torch.Tensor:
    """[rows, 1]. By halves, each an elementwise sum: torch's own order depends on the CPU, and so do its last bits."""
    while (width := rows.shape[1]) > 1:
        rows = rows[:, : width // 2] + rows[:, width // 2 :]
    return rows
