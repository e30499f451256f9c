"""zstd frames: ours come back, hostile ones are refused before they cost anything."""

import contextlib
import threading
import tracemalloc
from collections.abc import Iterator

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from hetero_async.errors import PeerError
from hetero_async.formats.compression import LEVEL_MAX, WINDOW_BYTES_MAX, compress, decompress

RAW = b"delta" * 1000
BOMB_BYTES = 1 << 30
# What refusing a frame may take, whatever it claims to be.
MEMORY_BYTES_MAX = 10_000_000


def frame_of(raw: bytes, level: int = 1, checksum: bool = True, size: bool = True) -> bytes:
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=checksum, write_content_size=size)
    return compressor.compress(raw)


def long_window_frame(raw: bytes) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(
        window_log=24, write_checksum=True, write_content_size=True, strategy=zstandard.STRATEGY_FAST
    )
    return zstandard.ZstdCompressor(compression_params=parameters).compress(raw)


def dictionary_frame(raw: bytes) -> bytes:
    samples = [b"sample %d of a dictionary" % number * 20 for number in range(200)]
    dictionary = zstandard.train_dictionary(1024, samples)
    return zstandard.ZstdCompressor(dict_data=dictionary, write_checksum=True).compress(raw)


@contextlib.contextmanager
def refused(match: str | None = None) -> Iterator[pytest.ExceptionInfo[PeerError]]:
    """What is done in it ends with a PeerError, and takes next to no memory."""
    tracemalloc.start()
    try:
        with pytest.raises(PeerError, match=match) as refusal:
            yield refusal
        assert tracemalloc.get_traced_memory()[1] < MEMORY_BYTES_MAX
    finally:
        tracemalloc.stop()


def test_what_was_compressed_comes_back() -> None:
    assert decompress(compress(RAW), len(RAW)) == RAW


@given(st.binary(max_size=5000), st.sampled_from([1, 3, 19]))
def test_any_bytes_come_back(raw: bytes, level: int) -> None:
    assert decompress(compress(raw, level), len(raw)) == raw
    assert decompress(memoryview(compress(memoryview(raw), level)), len(raw)) == raw


@pytest.mark.parametrize("level", range(1, LEVEL_MAX + 1))
def test_every_level_stays_within_the_window_that_is_accepted(level: int) -> None:
    raw = bytes(WINDOW_BYTES_MAX * 3)
    assert zstandard.get_frame_parameters(compress(raw, level)).window_size <= WINDOW_BYTES_MAX


@pytest.mark.parametrize("level", [0, -1, LEVEL_MAX + 1, 22])
def test_other_levels_are_a_mistake_of_ours(level: int) -> None:
    with pytest.raises(AssertionError, match="level"):
        compress(RAW, level)


HOSTILE = {
    "nothing": b"",
    "no frame": b"hello, I am not a frame",
    "states another size": frame_of(RAW + b"!"),
    "states no size": frame_of(RAW, size=False),
    "no checksum": frame_of(RAW, checksum=False),
    "wrong checksum": frame_of(RAW)[:-1] + bytes([frame_of(RAW)[-1] ^ 1]),
    "trailing junk": frame_of(RAW) + b"x",
    "two frames": frame_of(RAW) * 2,
    "skippable frame first": b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + frame_of(RAW),
}


@pytest.mark.parametrize("frame", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_frames_are_refused_in_one_line(frame: bytes) -> None:
    with refused() as refusal:
        decompress(frame, len(RAW))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("size", [True, False])
def test_a_gibibyte_in_a_few_bytes_is_refused_whether_it_says_so_or_not(size: bool) -> None:
    bomb = frame_of(bytes(BOMB_BYTES), size=size)
    with refused() as refusal:
        decompress(bomb, len(RAW))
    assert "\n" not in str(refusal.value)


def test_a_frame_that_needs_a_dictionary_is_refused() -> None:
    frame = dictionary_frame(RAW)
    with refused("needs dictionary"):
        decompress(frame, len(RAW))


def test_a_window_beyond_8_mib_is_refused() -> None:
    raw = bytes(40 << 20)
    frame = long_window_frame(raw)
    with refused("window"):
        decompress(frame, len(raw))


@pytest.mark.parametrize("end", range(len(compress(RAW))))
def test_a_truncated_frame_is_refused(end: int) -> None:
    with refused():
        decompress(compress(RAW)[:end], len(RAW))


@pytest.mark.parametrize("at", range(len(compress(RAW))))
def test_a_flipped_bit_never_changes_the_content(at: int) -> None:
    frame = bytearray(compress(RAW))
    frame[at] ^= 1 << at % 8
    with contextlib.suppress(PeerError):
        assert decompress(frame, len(RAW)) == RAW  # a bit that zstd does not use


@pytest.mark.parametrize("damage", [b"x", compress(b"")])
def test_junk_after_an_empty_frame_is_refused(damage: bytes) -> None:
    with refused():
        decompress(compress(b"") + damage, 0)


@pytest.mark.parametrize("end", range(len(compress(b""))))
def test_a_truncated_empty_frame_is_refused(end: int) -> None:
    with refused():
        decompress(compress(b"")[:end], 0)


def test_a_bomb_is_refused_without_unpacking_it() -> None:
    stream = zstandard.ZstdCompressor(write_checksum=True).compressobj(size=BOMB_BYTES)
    bomb = b"".join([*(stream.compress(bytes(BOMB_BYTES // 16)) for _ in range(16)), stream.flush()])
    assert len(bomb) < 100_000
    assert zstandard.get_frame_parameters(bomb).content_size == BOMB_BYTES
    with refused("expected 1000"):
        decompress(bomb, 1000)


def test_a_size_that_no_machine_has_is_refused() -> None:
    frame = b"\x28\xb5\x2f\xfd\xc4\x00" + (2**50).to_bytes(8, "little") + b"\x01\x00\x00"
    with refused("not a whole zstd frame"):
        decompress(frame, 2**50)


def test_a_size_forged_to_the_expected_one_is_refused() -> None:
    frame = frame_of(bytes(5000))
    at = frame.index((5000 - 256).to_bytes(2, "little"))
    forged = frame[:at] + (1000 - 256).to_bytes(2, "little") + frame[at + 2 :]
    assert zstandard.get_frame_parameters(forged).content_size == 1000
    with refused():
        decompress(forged, 1000)


@given(st.binary(max_size=200), st.integers(0, 300))
def test_random_bytes_are_refused(frame: bytes, expected_bytes: int) -> None:
    with pytest.raises(PeerError):
        decompress(b"\x28\xb5\x2f\xfd" + frame, expected_bytes)


def test_threads_do_not_disturb_each_other() -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        raw = bytes([number]) * 300_000
        wrong.extend(number for _ in range(50) if decompress(compress(raw), len(raw)) != raw)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
