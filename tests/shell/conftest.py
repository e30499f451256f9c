"""What tests of the link start from."""

from pathlib import Path

import pytest
from shell.etcd_cluster import etcd, etcd_of_module  # noqa: F401, fixtures
from shell.place import Place, prepared
from shell.small_log import small_segments  # noqa: F401, a fixture


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return prepared(tmp_path)
