"""topk: of each chunk of 4096 the 64 largest by magnitude, as gaps between them and two bits each; the rest is zero.

With error feedback, whose memory is the momentum then, for the thinnest of links: SparseLoCo (Sarfi et al. 2025, arXiv
2508.15706). Raw, by planes of all chunks: two magnitudes, low and high bytes of the gaps, codes. 0.29 bits a parameter,
of which zstd leaves less since the high bytes of gaps are nearly all zero.
"""

import torch

from hetero_async.errors import PeerError
from hetero_async.tensors.codecs.codec import Codec, as_bytes, from_planes, planes
from hetero_async.tensors.codecs.magnitudes import LEVEL_BYTES, LEVELS, crumbs, packed_crumbs, restored, two_magnitudes

CHUNK, KEPT = 4096, 64
GAP_BYTES = 2
CHUNKS_AT_A_TIME = 256
CUT = 1.0  # those that are kept lie close together


class TopK(Codec):
    name = "topk"

    def raw_bytes(self, numel: int) -> int:
        return (LEVELS * LEVEL_BYTES + KEPT * GAP_BYTES + KEPT // 4) * _chunk_count(numel)

    def encode(self, flat: torch.Tensor) -> torch.Tensor:
        chunks = torch.nn.functional.pad(flat, (0, _chunk_count(flat.numel()) * CHUNK - flat.numel())).view(-1, CHUNK)
        kept = (
            torch.cat([_largest(some) for some in chunks.split(CHUNKS_AT_A_TIME)])
            if len(chunks)
            else chunks[:, :KEPT].long()
        )
        counts = _kept_counts(flat.numel(), 0, len(chunks)).to(flat.device)[:, None]
        is_kept = torch.arange(KEPT, device=flat.device) < counts
        places = torch.where(is_kept, kept, CHUNK).sort(dim=1).values
        values = torch.where(is_kept, chunks.gather(1, places.clamp(max=CHUNK - 1)), 0.0)
        gaps = torch.where(is_kept, places.diff(dim=1, prepend=places.new_full((len(places), 1), -1)) - 1, 0)
        levels, codes = two_magnitudes(values, counts.float()[:, 0], CUT)
        return torch.cat([as_bytes(levels), planes(gaps.to(torch.int16), GAP_BYTES), packed_crumbs(codes)])

    def check(self, raw: torch.Tensor, numel: int) -> None:
        """Raises PeerError for a place beyond the vector. Each lies behind the one before: a gap is no less than 0."""
        chunk_count = _chunk_count(numel)
        counts, places = _kept_counts(numel, 0, chunk_count)[:, None], self._places(raw, numel, 0, chunk_count)
        last = places.gather(1, counts - 1)
        if (last[:-1] >= CHUNK).any() or (last[-1:] >= _last_size(numel)).any():
            raise PeerError("a place in a topk payload lies beyond its chunk")

    def decode(self, raw: torch.Tensor, numel: int, start: int, out: torch.Tensor) -> None:
        chunk_count, first, stop = _chunk_count(numel), start // CHUNK, _chunk_count(start + out.numel())
        levels = raw[: LEVELS * LEVEL_BYTES * chunk_count].view(torch.bfloat16).view(-1, LEVELS)[first:stop]
        packed = raw[(LEVELS * LEVEL_BYTES + GAP_BYTES * KEPT) * chunk_count :][first * KEPT // 4 : stop * KEPT // 4]
        codes = crumbs(packed).view(-1, KEPT)
        places = self._places(raw, numel, first, stop)
        is_kept = torch.arange(KEPT) < _kept_counts(numel, first, stop)[:, None]
        places = places + CHUNK * torch.arange(first, stop)[:, None] - start
        is_kept &= (places >= 0) & (places < out.numel())
        out.zero_()
        out[places[is_kept]] = restored(levels, codes)[is_kept]

    def _places(self, raw: torch.Tensor, numel: int, first: int, stop: int) -> torch.Tensor:
        """int64 [chunks, KEPT], within their chunk; behind the kept ones of a chunk they mean nothing."""
        begin = LEVELS * LEVEL_BYTES * _chunk_count(numel)
        stored = raw[begin:][: GAP_BYTES * KEPT * _chunk_count(numel)]
        gaps = from_planes(stored, GAP_BYTES, first * KEPT, (stop - first) * KEPT)
        return (gaps.view(-1, KEPT).long() % (1 << 16) + 1).cumsum(dim=1) - 1


def _largest(chunks: torch.Tensor) -> torch.Tensor:
    """int64 [chunks, KEPT]: the places of the largest magnitudes, in any order; of equal ones the first."""
    # The bits of positive floats are in the floats' order; with its place behind it no two are equal, so that all CPUs
    # choose the same.
    sizes = chunks.abs().view(torch.int32).long() * CHUNK
    return sizes.add_(torch.arange(CHUNK - 1, -1, -1, device=chunks.device)).topk(KEPT, dim=1, sorted=False).indices


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
