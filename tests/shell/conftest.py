"""What tests of the link start from."""

from pathlib import Path

import pytest
from shell.place import Place, prepared


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return prepared(tmp_path)
