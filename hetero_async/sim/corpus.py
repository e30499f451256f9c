"""The text that learning studies read: on every machine that has this software, and real.

Each text is in three parts: for training, for choosing between settings, and for reporting, which nobody chooses by.
Called by text.py.
"""

import functools
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from hetero_async.errors import UserError

# Folders of the standard library that a distribution may leave out, or that hold tables instead of programs.
LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
)
TEXT_BYTES_MAX = 8_000_000
# Of ten pieces of a text one is reported on and one chosen by; the first and the sixth.
PIECES, REPORTED, CHOSEN = 10, 0, 5
# Of domains, which are not in files of like size.
PIECE_BYTES = 16_384
DOMAIN_BYTES_MAX = 2_000_000


@dataclass(frozen=True, slots=True)
class Corpus:
    """One text for all sites, or one for each; uint8. All that is held out is examined, whosever it is."""

    training: tuple[Tensor, ...]
    choosing: tuple[Tensor, ...]
    reporting: tuple[Tensor, ...]
    sites: tuple[str, ...] = ()  # whose text each is, where they differ

    def of_site(self, site: str) -> Tensor:
        return self.training[self.sites.index(site) if self.sites else 0]

    @property
    def fingerprint(self) -> str:
        """Equal where two machines train on the same text."""
        whole = xxhash.xxh3_128()
        for part in (*self.training, *self.choosing, *self.reporting):
            whole.update(part.numpy().data)
        return whole.hexdigest()


@functools.cache
def standard_library() -> Corpus:
    """Python's own programs, in the order of their names."""
    root, room = _standard_library(), TEXT_BYTES_MAX
    files: list[bytes] = []
    for path in sorted(_programs(root)):
        size = path.stat().st_size
        if size <= room:
            room -= size
            files.append(path.read_bytes())
    return _corpus([files])


@functools.cache
def domains(sites: tuple[str, ...]) -> Corpus:
    """A domain of text for each site: programs in Python, tables of characters, C++, English prose. Up to four sites.

    Raises UserError where there are more sites, or where this machine lacks one of the domains.
    """
    root, include = _standard_library(), Path(torch.__file__).parent / "include"
    found = {
        "Python's programs": _read(_programs(root)),
        "Python's tables of characters": _read((root / "encodings").glob("*.py")),
        "torch's C++ headers": _read((include / "ATen").rglob("*.h")),
        "Python's topics in English": _read((root / "pydoc_data").glob("topics.py")),
    }
    if len(sites) > len(found):
        raise UserError(f"there are {len(sites)} sites and {len(found)} domains of text: {', '.join(found)}")
    for domain, text in found.items():
        if len(text) < PIECES * PIECE_BYTES:
            raise UserError(f"this machine lacks a domain of text: {domain}; is Python installed whole?")
    texts = list(found.values())[: len(sites)]
    return _corpus([[text[at : at + PIECE_BYTES] for at in range(0, len(text), PIECE_BYTES)] for text in texts], sites)


def _standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _programs(root: Path) -> Iterator[Path]:
    return (path for path in root.rglob("*.py") if LEFT_OUT.isdisjoint(path.relative_to(root).parts))


def _read(paths: Iterable[Path]) -> bytes:
    text = bytearray()
    for path in sorted(paths):
        if len(text) >= DOMAIN_BYTES_MAX:
            break
        text += path.read_bytes()
    return bytes(text[:DOMAIN_BYTES_MAX])


def _corpus(texts: Sequence[Sequence[bytes]], sites: tuple[str, ...] = ()) -> Corpus:
    """`texts`: the pieces of each."""
    held_out = (REPORTED, CHOSEN)
    return Corpus(
        training=tuple(
            _bytes(b"".join(piece for number, piece in enumerate(pieces) if number % PIECES not in held_out))
            for pieces in texts
        ),
        choosing=tuple(_bytes(b"".join(pieces[CHOSEN::PIECES])) for pieces in texts),
        reporting=tuple(_bytes(b"".join(pieces[REPORTED::PIECES])) for pieces in texts),
        sites=sites,
    )


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
