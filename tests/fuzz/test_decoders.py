"""No bytes whatever make a decoder do anything but return a value or raise its one error, in bounded memory."""

import tracemalloc
from pathlib import Path

import pytest
from fuzz.decoders import DECODERS, Decoder
from hypothesis import given, settings
from hypothesis import strategies as st

FOUND = Path(__file__).parent / "found"
INPUT_BYTES_MAX = 512
EXAMPLES = 60
# What decoding 64 KiB of anything may take, whatever they claim to be.
MEMORY_BYTES_MAX = 24 * 1024 * 1024


@st.composite
def damaged(draw: st.DrawFn, good: list[bytes]) -> bytes:
    """Good input with a few bytes exchanged, left out or put in: it comes further than noise does."""
    data = bytearray(draw(st.sampled_from(good)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=4))
    return bytes(data)


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_returns_a_value_or_raises_its_one_error(name: str) -> None:
    decoder, good = DECODERS[name]

    @settings(max_examples=max(EXAMPLES, settings().max_examples if settings().max_examples > 100 else 0))
    @given(st.one_of(damaged(good), st.binary(max_size=INPUT_BYTES_MAX)))
    def survives(data: bytes) -> None:
        decoder(data)

    survives()


@pytest.mark.parametrize("name", DECODERS)
def test_good_input_is_what_the_fuzzers_start_from(name: str) -> None:
    """An input that every decoder refuses at its first byte would show nothing."""
    decoder, good = DECODERS[name]
    for data in good:
        decoder(data)


BULKY = {
    "ones": b"\xff" * 65536,
    "arrays": b"\x91" * 65536,
    "empty maps": b"\xdd\x00\x00\xff\x00" + b"\x80" * 65531,
    "brackets": b"[" * 65536,
    "json maps": b'{"a":' * 13107,
    "toml": b"a." * 32768 + b"a=1",
    "toml tables": b"\n".join(b"[a%d]" % number for number in range(7000)),
}


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("bulk", BULKY)
def test_what_claims_to_be_much_takes_little_memory(name: str, bulk: str) -> None:
    decoder: Decoder = DECODERS[name][0]
    decoder(DECODERS[name][1][0])  # caches are filled
    tracemalloc.start()
    try:
        decoder(BULKY[bulk])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MEMORY_BYTES_MAX


def findings() -> list[Path]:
    return sorted(path for path in FOUND.glob("*/*") if path.is_file())


@pytest.mark.parametrize("path", findings(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_was_found_once_is_survived_now(path: Path) -> None:
    DECODERS[path.parent.name][0](path.read_bytes())
