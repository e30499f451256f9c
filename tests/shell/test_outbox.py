"""The outbox keeps what is not answered, through any death of its worker."""

import json
from pathlib import Path

import pytest
import xxhash

from hetero_async.core.messages import Push
from hetero_async.shell.outbox import ACKNOWLEDGED, FileOutbox


def push(seq: int, payload: bytes) -> Push:
    return Push(
        incarnation=1,
        seq=seq,
        anchor=0,
        anchor_term=1,
        steps=3,
        ranges=((0, 8),),
        codec="int8",
        payload_bytes=len(payload),
        payload_hash=xxhash.xxh3_128_digest(payload),
    )


def test_what_was_saved_is_there_for_the_next_life(tmp_path: Path) -> None:
    outbox = FileOutbox(tmp_path)
    outbox.save(push(1, b"one"), b"one")
    outbox.save(push(2, b"two"), b"two")
    assert FileOutbox(tmp_path).load() == {1: (push(1, b"one"), b"one"), 2: (push(2, b"two"), b"two")}


def test_an_acknowledged_delta_goes_and_leaves_a_note(tmp_path: Path) -> None:
    FileOutbox(tmp_path).save(push(1, b"one"), b"one")
    outbox = FileOutbox(tmp_path)
    outbox.load()
    outbox.drop(1, is_acknowledged=True)
    (note,) = (tmp_path / ACKNOWLEDGED).read_text().splitlines()
    assert json.loads(note) == {"seq": 1, "payload_hash": push(1, b"one").payload_hash.hex()}
    assert FileOutbox(tmp_path).load() == {}
    assert FileOutbox(tmp_path).acknowledged() == [1]


def test_a_refused_delta_goes_without_a_note(tmp_path: Path) -> None:
    outbox = FileOutbox(tmp_path)
    outbox.save(push(1, b"one"), b"one")
    outbox.drop(1, is_acknowledged=False)
    assert not (tmp_path / ACKNOWLEDGED).exists()
    assert outbox.load() == {}


def test_a_note_that_a_power_cut_has_torn_is_cut_off_before_the_next(tmp_path: Path) -> None:
    (tmp_path / ACKNOWLEDGED).write_text('{"seq": 1, "payload_hash": ""}\n{"seq": 2, "payl')
    FileOutbox(tmp_path).drop(3, is_acknowledged=True)
    notes = (tmp_path / ACKNOWLEDGED).read_text().splitlines()
    assert [json.loads(note)["seq"] for note in notes] == [1, 3]


@pytest.mark.parametrize("position", [0, 9, 40, -1])
def test_a_damaged_file_is_set_aside_and_not_sent(tmp_path: Path, position: int) -> None:
    FileOutbox(tmp_path).save(push(1, b"payload"), b"payload")
    (path,) = tmp_path.glob("*.delta")
    damaged = bytearray(path.read_bytes())
    damaged[position] ^= 0x10
    path.write_bytes(damaged)
    assert FileOutbox(tmp_path).load() == {}
    assert [found.suffix for found in tmp_path.iterdir()] == [".damaged"]
