"""A real etcd cluster for tests. Where etcd is not installed they are skipped, and say so.

A conftest.py imports the fixtures; each test takes a run name of its own and leaves all members running.
"""

import shutil
from collections.abc import Iterator

import pytest
from etcd_local import INSTALL, LocalCluster


@pytest.fixture(scope="module")
def etcd_of_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    if shutil.which("etcd") is None:
        pytest.skip(INSTALL)
    with LocalCluster(tmp_path_factory.mktemp("etcd")) as cluster:
        yield cluster


@pytest.fixture
def etcd(etcd_of_module: LocalCluster) -> Iterator[LocalCluster]:
    """Three members that answer, before a test as after it."""
    yield etcd_of_module
    etcd_of_module.restore()
