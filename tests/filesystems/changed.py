"""A program: the short lives of power.py with changed code, each change in a process that has never seen the real one.

`python -m filesystems.changed KIND LIFE DIRECTORY ...`: each directory holds a changed copy of the package; the first
promise that it breaks is written beside it. What takes long to import is imported once, and each process forked from
there. Nothing of the package may be imported here.
"""

import os
import sys
from pathlib import Path

import torch  # noqa: F401, takes long
import zmq  # noqa: F401

BROKEN = "broken"


def main(words: list[str]) -> None:
    for kind, life, directory in zip(words[::3], words[1::3], map(Path, words[2::3]), strict=True):
        assert "hetero_async" not in sys.modules
        child = os.fork()
        if child == 0:
            try:
                (directory / BROKEN).write_text(broken(kind, life, directory))
            finally:
                os._exit(0)
        os.waitpid(child, 0)


def broken(kind: str, life: str, directory: Path) -> str:
    sys.path.insert(0, str(directory))
    from filesystems import power

    changed = sys.modules["hetero_async"].__file__
    assert changed is not None and Path(changed).is_relative_to(directory), "the change is not what runs"
    return power.first_broken(kind, directory / "volume", life)


if __name__ == "__main__":
    main(sys.argv[1:])
