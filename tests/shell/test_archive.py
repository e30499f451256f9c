"""The archive's objects: put once, never changed, whole or not there, in a bucket and in a directory alike."""

import json
import threading
from collections.abc import Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from shell.bucket import REQUEST_SECONDS, Proxy, proxied, s3_server

from hetero_async.errors import ArchiveAway, ArchiveConflict, ConfigError
from hetero_async.ports import Archive
from hetero_async.shell.archive import UNFINISHED, ObjectArchive, open_archive


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture
def bucket(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Proxy, Archive]]:
    with proxied(port, monkeypatch) as (proxy, url):
        yield proxy, open_archive(url, Path(), REQUEST_SECONDS)


@pytest.fixture(params=["bucket", "directory", "file URL"])
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> Archive:
    match request.param:
        case "bucket":
            return request.getfixturevalue("bucket")[1]
        case "directory":
            return open_archive("sub/archive", tmp_path)
        case _:
            return open_archive(f"file://{tmp_path}/archive", Path("/nowhere"))


def test_what_was_put_is_listed_and_given(archive: Archive) -> None:
    assert archive.list() == archive.list("run") == {}
    archive.put_new("run/log/1.log", b"first")
    archive.put_new("other/log/1.log", b"")
    archive.put_new("run-2/log/1.log", bytes(100_000))
    assert {name: archived.size_bytes for name, archived in archive.list().items()} == {
        "run/log/1.log": 5,
        "other/log/1.log": 0,
        "run-2/log/1.log": 100_000,
    }
    assert list(archive.list("run")) == ["run/log/1.log"]
    assert archive.list()["run/log/1.log"].stored_at > 1e9
    assert archive.get("run/log/1.log") == b"first"
    assert archive.get("run-2/log/1.log") == bytes(100_000)
    with pytest.raises(FileNotFoundError):
        archive.get("run/log/2.log")


def test_nothing_is_ever_overwritten(archive: Archive) -> None:
    archive.put_new("run/x", b"first")
    archive.put_new("run/x", b"first")
    with pytest.raises(ArchiveConflict, match=r"run/x: the archive holds 5 other bytes under this name and keeps them"):
        archive.put_new("run/x", b"other")
    assert archive.get("run/x") == b"first"


def test_of_many_that_put_one_name_at_once_one_wins_and_the_others_hear_of_it(archive: Archive) -> None:
    outcomes: list[bytes] = []

    def put(content: bytes) -> None:
        try:
            archive.put_new("run/x", content)
            outcomes.append(content)
        except ArchiveConflict:
            outcomes.append(b"")

    threads = [threading.Thread(target=put, args=(bytes([number]) * 10_000,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [winner] = [content for content in outcomes if content]
    assert len(outcomes) == 8
    assert archive.get("run/x") == winner


@pytest.mark.parametrize("fault", ["409", "412", "500", "503", "silent", "torn before"])
def test_a_put_that_failed_says_so_and_succeeds_later(bucket: tuple[Proxy, Archive], fault: str) -> None:
    proxy, archive = bucket
    proxy.faults.append(fault)
    with pytest.raises(ArchiveAway, match="run/x: "):
        archive.put_new("run/x", b"content")
    assert archive.list() == {}
    archive.put_new("run/x", b"content")
    assert archive.get("run/x") == b"content"


def test_a_put_whose_answer_was_lost_is_recognized_the_next_time(bucket: tuple[Proxy, Archive]) -> None:
    proxy, archive = bucket
    proxy.faults.append("torn after")
    with pytest.raises(ArchiveAway):
        archive.put_new("run/x", b"content")
    archive.put_new("run/x", b"content")
    with pytest.raises(ArchiveConflict):
        archive.put_new("run/x", b"other")


@pytest.mark.parametrize("fault", ["500", "503", "silent", "torn before", "torn within"])
def test_what_was_not_given_whole_is_not_given(bucket: tuple[Proxy, Archive], fault: str) -> None:
    proxy, archive = bucket
    archive.put_new("run/x", b"content")
    proxy.method = "GET"
    proxy.faults.append(fault)
    with pytest.raises(ArchiveAway, match="run/x: "):
        archive.get("run/x")
    proxy.faults.append("torn within")
    with pytest.raises(ArchiveAway, match="run: "):
        archive.list("run")
    assert archive.get("run/x") == b"content"


def test_a_bucket_that_does_not_exist_is_an_archive_that_is_away(bucket: tuple[Proxy, Archive]) -> None:
    archive = open_archive("s3://no-such-bucket/x", Path(), REQUEST_SECONDS)
    with pytest.raises(ArchiveAway, match="NoSuchBucket"):
        archive.put_new("run/x", b"")
    with pytest.raises(ArchiveAway, match="NoSuchBucket"):
        archive.list()


def test_a_directory_that_cannot_be_written_is_an_archive_that_is_away(tmp_path: Path) -> None:
    (tmp_path / "archive").write_text("a file")
    archive = open_archive("archive", tmp_path)
    with pytest.raises(ArchiveAway, match="archive/run/x"):
        archive.put_new("run/x", b"")


def test_a_file_that_was_being_written_when_the_power_went_is_not_listed(tmp_path: Path) -> None:
    archive = open_archive("archive", tmp_path)
    archive.put_new("run/x", b"content")
    (tmp_path / "archive" / "run" / f"{UNFINISHED}abc").write_bytes(b"cont")
    assert list(archive.list()) == ["run/x"]
    assert [path.name for path in (tmp_path / "archive" / "run").iterdir() if path.name != "x"] == [f"{UNFINISHED}abc"]


class Cloud(ThreadingHTTPServer):
    """Takes whatever is put. `put`: where, and with which headers."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Taking)
        self.put: list[tuple[str, Message]] = []


class Taking(BaseHTTPRequestHandler):
    server: Cloud

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.server.put.append((self.path, self.headers))
        self.send_response(201)
        for name, value in (("etag", '"1"'), ("content-length", "0")):
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Says nothing."""


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    """The environment leads to it, with an account of Azure's and a service account of Google's."""
    with Cloud() as cloud:
        url = f"http://127.0.0.1:{cloud.server_port}"
        nobody = dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
        google = {"gcs_base_url": url, "disable_oauth": True, **nobody}
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", url)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(google))
        thread = threading.Thread(target=cloud.serve_forever, args=(0.05,))
        thread.start()
        yield cloud
        cloud.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("url", "store", "path", "condition", "authorization"),
    [
        ("az://place/in/it", "AzureStore", "/place/in/it/run/x", ("if-none-match", "*"), "SharedKey account:"),
        ("gs://place/in/it", "GCSStore", "/place/in%2Fit%2Frun%2Fx", ("x-goog-if-generation-match", "0"), "Bearer"),
    ],
)
def test_azure_s_and_google_s_buckets_are_put_to_with_the_environment_s_account_and_never_overwritten(
    cloud: Cloud, url: str, store: str, path: str, condition: tuple[str, str], authorization: str
) -> None:
    archive = open_archive(url, Path(), REQUEST_SECONDS)
    assert isinstance(archive, ObjectArchive) and type(archive._store).__name__ == store
    archive.put_new("run/x", b"content")
    [(put_at, headers)] = cloud.put
    assert put_at == path
    assert headers[condition[0]] == condition[1]
    assert headers["authorization"].startswith(authorization)


@pytest.mark.parametrize(
    "url", ["ftp://host/path", "s3://", "s3:///", "file://relative", "http://bucket/x", "az://c/p"]
)
def test_a_url_that_is_no_archive_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=f'archive "{url}": '):
        open_archive(url, Path())
