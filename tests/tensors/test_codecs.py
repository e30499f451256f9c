"""Codecs keep what they promise: size, error, any block at any time, and the same bits everywhere."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors.models import values

from hetero_async.errors import PeerError
from hetero_async.tensors.codecs import BLOCK, CODECS, decode_payload, encode_payload, open_payload

NAMES = sorted(CODECS)
LENGTHS = [0, 1, 2, 63, 64, 65, 127, 128, 129, 1000]
TINY = 2.0**-149  # the smallest fp32
# Within a rounding of fp32's largest number a block decodes to infinity. Inspection refuses all beyond 2^64 anyway.
LARGEST = 2.0**127


def there_and_back(name: str, flat: torch.Tensor) -> torch.Tensor:
    return decode_payload(name, encode_payload(name, flat), flat.numel())


def relative_squared_error(name: str, flat: torch.Tensor) -> float:
    error = there_and_back(name, flat).double() - flat.double()
    return float(error.square().sum() / flat.double().square().sum())


def test_fp32_is_exact() -> None:
    flat = torch.tensor([0.0, -0.0, 1.0, math.pi, TINY, -TINY, 3.4e38, float("inf")])
    assert torch.equal(there_and_back("fp32", flat).view(torch.int32), flat.view(torch.int32))


def test_bf16_rounds_to_the_nearest_and_to_even() -> None:
    flat = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8])
    assert there_and_back("bf16", flat).tolist() == [1.0, 1.0, 1 + 2**-6, 1 + 2**-7, -1.0]


# Published and measured figures for blocks of 64: algorithms for Gaussian values, and for heavier tails.
@pytest.mark.parametrize(
    ("name", "shape", "low", "high"),
    [
        ("int8", "gauss", 2e-5, 5e-5),
        ("int8", "laplace", 4e-5, 1e-4),
        ("int4", "gauss", 0.010, 0.014),
        ("int4", "laplace", 0.016, 0.024),
        ("e3m0", "gauss", 0.036, 0.042),
        ("e3m0", "laplace", 0.032, 0.038),
        ("2bit", "gauss", 0.110, 0.125),
        ("2bit", "laplace", 0.150, 0.190),
        ("topk", "gauss", 0.86, 0.90),
        ("topk", "laplace", 0.77, 0.81),
        ("bf16", "gauss", 1e-6, 5e-6),
        ("fp32", "gauss", 0.0, 0.0),
    ],
)
def test_the_error_is_the_one_that_is_known(name: str, shape: str, low: float, high: float) -> None:
    generator = torch.Generator().manual_seed(5)
    flat = torch.randn(2**18, generator=generator)
    if shape == "laplace":
        signs = torch.sign(flat)
        flat = torch.empty(2**18).exponential_(generator=generator) * signs
    assert low <= relative_squared_error(name, flat) <= high


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("numel", LENGTHS)
def test_raw_bytes_follow_from_the_length_alone(name: str, numel: int) -> None:
    raw = CODECS[name].encode(values(numel, seed=1))
    assert raw.dtype == torch.uint8
    assert raw.numel() == CODECS[name].raw_bytes(numel)
    assert there_and_back(name, values(numel, seed=1)).shape == (numel,)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("fp32", 32), ("bf16", 16), ("int8", 8.5), ("int4", 4.5), ("e3m0", 4.5), ("2bit", 2.5), ("topk", 148 / 512)],
)
def test_bits_a_parameter(name: str, bits: float) -> None:
    assert CODECS[name].raw_bytes(40_960) * 8 == bits * 40_960


@given(
    name=st.sampled_from(NAMES),
    numel=st.one_of(st.integers(0, 700), st.integers(4000, 9000)),
    cuts=st.lists(st.integers(0, 140), max_size=4),
    seed=st.integers(0, 2**32),
)
def test_any_stretch_from_a_block_on_decodes_to_the_same_bits(
    name: str, numel: int, cuts: list[int], seed: int
) -> None:
    flat = values(numel, seed)
    whole = there_and_back(name, flat)
    raw = CODECS[name].encode(flat)
    edges = sorted({0, numel, *(min(BLOCK * cut, numel) for cut in cuts)})
    pieces = torch.full((numel,), float("nan"))
    for start, stop in reversed(list(pairwise(edges))):
        CODECS[name].decode(raw, numel, start, pieces[start:stop])
    assert torch.equal(pieces, whole)


@given(
    name=st.sampled_from(["int8", "int4"]),
    floats=st.lists(st.floats(-LARGEST, LARGEST, width=32), min_size=1, max_size=200),
)
def test_no_element_is_off_by_more_than_half_a_level_of_its_block(name: str, floats: list[float]) -> None:
    levels = {"int8": 127, "int4": 7}[name]
    flat = torch.tensor(floats, dtype=torch.float32)
    decoded = there_and_back(name, flat)
    assert torch.isfinite(decoded).all()
    for block, back in zip(flat.split(BLOCK), decoded.split(BLOCK), strict=True):
        largest = float(block.abs().max())
        # Denormal scales are coarse: their own rounding may cost up to half the smallest number a level.
        allowed = 0.5001 * largest / levels + levels * TINY
        assert float((block.double() - back.double()).abs().max()) <= allowed


@pytest.mark.parametrize("name", NAMES)
def test_zeros_come_back_as_zeros(name: str) -> None:
    assert not there_and_back(name, torch.zeros(200)).view(torch.int32).any()  # not even a sign


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_loud_block_does_not_drown_its_neighbour(name: str) -> None:
    flat = torch.cat([torch.full((64,), 1e6), torch.full((64,), 1e-6), torch.zeros(64), torch.full((3,), -2.0)])
    torch.testing.assert_close(there_and_back(name, flat), flat, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_largest_of_a_block_survives_on_both_sides_of_zero(name: str) -> None:
    flat = torch.zeros(64)
    flat[3], flat[60] = 5.0, -5.0
    decoded = there_and_back(name, flat)
    assert decoded[3] == -decoded[60]
    torch.testing.assert_close(decoded, flat)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_not_hidden(name: str, fault: float) -> None:
    flat = values(200, seed=3)
    flat[70] = fault
    assert not torch.isfinite(there_and_back(name, flat)).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("numel", [64, 128, 130, 4096])
def test_the_vector_that_is_encoded_is_left_alone(name: str, numel: int) -> None:
    flat = values(numel, seed=3)
    before = flat.clone()
    CODECS[name].encode(flat)
    assert torch.equal(flat, before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("expected", [0, 1, 63, 129, 2**40, 2**90])
def test_a_payload_of_another_length_is_a_peers_fault(name: str, expected: int) -> None:
    with pytest.raises(PeerError):
        decode_payload(name, encode_payload(name, torch.ones(50_000)), expected)


def test_an_unknown_codec_is_a_peers_fault_and_the_known_ones_are_named() -> None:
    with pytest.raises(PeerError, match="unknown codec gzip; known: fp32, bf16, int8, int4, e3m0, 2bit, topk"):
        decode_payload("gzip", b"", 1)
    with pytest.raises(PeerError, match="unknown codec"):
        encode_payload("gzip", torch.ones(1))


@given(name=st.sampled_from(NAMES), junk=st.binary(max_size=80), numel=st.integers(0, 100))
def test_junk_is_a_peers_fault(name: str, junk: bytes, numel: int) -> None:
    with pytest.raises(PeerError):
        open_payload(name, junk, numel)


@pytest.mark.parametrize("name", NAMES)
def test_that_a_vector_is_coded_in_pieces_does_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = values(9000, seed=4)
    raw, back = CODECS[name].encode(flat), there_and_back(name, flat)
    monkeypatch.setattr("hetero_async.tensors.codecs.codec.PIECE", 64 * BLOCK)
    assert torch.equal(CODECS[name].encode(flat), raw)
    assert torch.equal(there_and_back(name, flat), back)
