"""What is put aside until its merge: read back to the bit, without a name, and refused when it has changed."""

import errno
import os
from pathlib import Path

import pytest

from hetero_async.errors import LogCorrupt
from hetero_async.shell.shelf import SHELVED_BYTES_MIN, FileShelf, Place

LARGE = os.urandom(SHELVED_BYTES_MIN)
OTHER = os.urandom(3 * SHELVED_BYTES_MIN + 5)


def test_what_is_put_there_is_found_again(tmp_path: Path) -> None:
    shelf = FileShelf(tmp_path)
    contents = [LARGE, b"small", OTHER, b""]
    places = [shelf.put(content) for content in contents]
    assert [shelf.look(place) for place in reversed(places)] == list(reversed(contents))
    assert isinstance(places[0], Place)
    assert not list(tmp_path.iterdir()), "the file has no name"


def test_its_file_is_empty_when_nothing_is_needed_any_more(tmp_path: Path) -> None:
    shelf = FileShelf(tmp_path)
    shelf.put(OTHER)
    assert os.fstat(shelf._file).st_size == len(OTHER)
    shelf.clear()
    assert os.fstat(shelf._file).st_size == 0
    assert shelf.look(shelf.put(LARGE)) == LARGE


def test_a_bit_that_has_rotted_halts(tmp_path: Path) -> None:
    shelf = FileShelf(tmp_path)
    place = shelf.put(LARGE)
    os.pwrite(shelf._file, bytes([LARGE[7] ^ 1]), 7)
    with pytest.raises(LogCorrupt):
        shelf.look(place)


def test_on_a_full_disk_it_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = FileShelf(tmp_path)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    first = shelf.put(OTHER)
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        place = shelf.put(LARGE)
    assert shelf.look(place) == LARGE
    assert shelf.look(first) == OTHER
