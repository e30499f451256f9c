"""Into how many stretches a pass is cut makes no difference to a bit."""

import pytest
import torch
from tensors.models import values

from hetero_async.tensors import passes
from hetero_async.tensors.codecs import CODECS
from hetero_async.tensors.codecs.codec import BLOCK

COEFFICIENTS = 0.9, 0.75, 1.0, 0.9


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("passes", "codecs.codec"):
        monkeypatch.setattr(f"hetero_async.tensors.{place}.PIECE", 64 * BLOCK)


def crew_of(size: int) -> passes.Crew:
    crew = passes.Crew()
    crew._size = size
    return crew


@pytest.mark.parametrize("numel", [0, 1, 64 * BLOCK, 64 * BLOCK + 1, 50_000])
def test_stretches_are_the_whole_in_order_and_begin_with_a_block(numel: int) -> None:
    stretches = crew_of(3).over(numel, lambda start, stop: (start, stop))
    assert [element for stretch in stretches for element in range(*stretch)] == list(range(numel))
    assert all(start % (64 * BLOCK) == 0 for start, _ in stretches)


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_a_merge_and_a_publish_are_the_same_with_any_number_of_threads(codec: str) -> None:
    numel, found = 50_000, []
    raws = [CODECS[codec].encode(values(numel, seed)) for seed in (1, 2)]
    for size in (1, 2, 5):
        crew, theta, momentum = crew_of(size), values(numel, seed=3), values(numel, seed=4)
        deltas = [(CODECS[codec], raw, weight) for raw, weight in zip(raws, (0.25, 0.75), strict=True)]
        length = passes.merge(crew, theta, [momentum], deltas, COEFFICIENTS)
        raw, shadow = passes.follow(crew, theta, values(numel, seed=5), CODECS[codec])
        assert length == pytest.approx(float(theta.double().norm()))
        found.append((theta, momentum, raw, shadow, torch.tensor(length)))
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], one, strict=True))


def test_the_length_of_what_is_not_finite_is_not_finite() -> None:
    flat = values(50_000, seed=1)
    flat[40_000] = torch.nan
    length = passes.norm(crew_of(3), lambda start, out: out.copy_(flat[start : start + len(out)]), len(flat))
    assert length != length
