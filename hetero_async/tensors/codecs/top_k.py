"""topk: of each chunk of 4096 the 64 largest by magnitude, as gaps between them and two bits each; the rest is zero.

With error feedback, whose memory is the momentum then, for the thinnest of links: SparseLoCo (Sarfi et al. 2025, arXiv
2508.15706). Raw, by planes of all chunks: two magnitudes, low and high bytes of the gaps, codes. 0.29 bits a parameter,
of which zstd leaves less since the high bytes of gaps are nearly all zero.
"""

import torch

from hetero_async.errors import PeerError
from hetero_async.tensors.codecs.codec import Codec, from_planes, put_planes
from hetero_async.tensors.codecs.magnitudes import LEVEL_BYTES, LEVELS, crumbs, packed_crumbs, restored, two_magnitudes

CHUNK, KEPT = 4096, 64
GAP_BYTES = 2
CUT = 1.0  # those that are kept lie close together


class TopK(Codec):
    name = "topk"

    def raw_bytes(self, numel: int) -> int:
        return (LEVELS * LEVEL_BYTES + KEPT * GAP_BYTES + KEPT // 4) * _chunk_count(numel)

    def code(self, piece: torch.Tensor, numel: int, start: int, raw: torch.Tensor) -> None:
        first, chunk_count = start // CHUNK, _chunk_count(piece.numel())
        chunks = torch.nn.functional.pad(piece, (0, chunk_count * CHUNK - piece.numel())).view(-1, CHUNK)
        counts = _kept_counts(numel, first, first + chunk_count).to(piece.device)
        is_kept = torch.arange(KEPT, device=piece.device) < counts[:, None]
        places = torch.where(is_kept, _largest(chunks), CHUNK).sort(dim=1).values
        values = torch.where(is_kept, chunks.gather(1, places.clamp(max=CHUNK - 1)), 0.0)
        gaps = torch.where(is_kept, places.diff(dim=1, prepend=places.new_full((chunk_count, 1), -1)) - 1, 0)
        levels, codes = two_magnitudes(values, counts.float(), CUT)
        all_levels, all_gaps, all_codes = _parts(raw, numel)
        all_levels[first : first + chunk_count] = levels
        put_planes(gaps.to(torch.int16).view(-1), all_gaps, first * KEPT)
        all_codes[first : first + chunk_count] = packed_crumbs(codes).view(chunk_count, -1)

    def check(self, raw: torch.Tensor, numel: int) -> None:
        """Raises PeerError for a place beyond the vector. Each lies behind the one before: a gap is no less than 0."""
        chunk_count = _chunk_count(numel)
        _, gaps, _ = _parts(raw, numel)
        last = _places(gaps, 0, chunk_count).gather(1, _kept_counts(numel, 0, chunk_count)[:, None] - 1)
        if (last[:-1] >= CHUNK).any() or (last[-1:] >= _last_size(numel)).any():
            raise PeerError("a place in a topk payload lies beyond its chunk")

    def decode(self, raw: torch.Tensor, numel: int, start: int, out: torch.Tensor) -> None:
        first, stop = start // CHUNK, _chunk_count(start + out.numel())
        levels, gaps, packed = _parts(raw, numel)
        codes = crumbs(packed[first:stop].view(-1)).view(-1, KEPT)
        places = _places(gaps, first, stop)
        is_kept = torch.arange(KEPT, device=raw.device) < _kept_counts(numel, first, stop).to(raw.device)[:, None]
        places = places + CHUNK * torch.arange(first, stop, device=raw.device)[:, None] - start
        is_kept &= (places >= 0) & (places < out.numel())
        out.zero_()
        out[places[is_kept]] = restored(levels[first:stop], codes)[is_kept]


def _parts(raw: torch.Tensor, numel: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels (bf16 [chunks, LEVELS]), gaps (uint8 [GAP_BYTES, chunks · KEPT]), codes (uint8 [chunks, KEPT / 4])."""
    chunk_count = _chunk_count(numel)
    sizes = LEVELS * LEVEL_BYTES, GAP_BYTES * KEPT, KEPT // 4
    levels, gaps, codes = raw.split([chunk_count * size for size in sizes])
    return (
        levels.view(torch.bfloat16).view(chunk_count, LEVELS),
        gaps.view(GAP_BYTES, chunk_count * KEPT),
        codes.view(chunk_count, KEPT // 4),
    )


def _places(gaps: torch.Tensor, first: int, stop: int) -> torch.Tensor:
    """int64 [chunks, KEPT], within their chunk; behind the kept ones of a chunk they mean nothing."""
    stored = from_planes(gaps, first * KEPT, (stop - first) * KEPT)
    return (stored.view(-1, KEPT).long() % (1 << 16) + 1).cumsum(dim=1) - 1


def _largest(chunks: torch.Tensor) -> torch.Tensor:
    """int64 [chunks, KEPT]: the places of the largest magnitudes, the largest first; of equal ones the first."""
    # The bits of positive floats are in the floats' order; with its place behind it no two are equal, so that all CPUs
    # choose the same.
    sizes = chunks.abs().view(torch.int32).long() * CHUNK
    return sizes.add_(torch.arange(CHUNK - 1, -1, -1, device=chunks.device)).topk(KEPT, dim=1).indices


def _chunk_count(numel: int) -> int:
    return -(-numel // CHUNK)


def _last_size(numel: int) -> int:
    return (numel - 1) % CHUNK + 1


def _kept_counts(numel: int, first: int, stop: int) -> torch.Tensor:
    """int64 [chunks]: the last of all, which may be smaller, keeps the same share, and at least one."""
    counts = torch.full((stop - first,), KEPT)
    if stop == _chunk_count(numel):
        counts[-1:] = -(-_last_size(numel) * KEPT // CHUNK)
    return counts
