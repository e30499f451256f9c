"""The dashboard of a real run, asked over HTTP: it shows what goes on, lets nobody write, and harms nobody."""

import http.client
import json
import re
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from e2e.harness import PATIENCE_SECONDS, Run, forked, free_port, until

from hetero_async.watch.chronicle import load_history
from hetero_async.watch.dashboard import READERS_MAX


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    """Status, headers by their lower-case names, body."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, PATIENCE_SECONDS)) as connection:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read().decode()


@contextmanager
def reading(port: int) -> Iterator[Iterator[tuple[str, Any]]]:
    """The server-sent events, as (name, content)."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, PATIENCE_SECONDS)) as connection:
        connection.request("GET", "/events")
        answer = connection.getresponse()
        assert answer.getheader("content-type") == "text/event-stream"

        def events() -> Iterator[tuple[str, Any]]:
            while name := answer.readline().decode():
                content = json.loads(answer.readline().decode().removeprefix("data: "))
                assert answer.readline() == b"\n"
                yield name.removeprefix("event: ").strip(), content

        yield events()


def silent_reader(port: int) -> socket.socket:
    """Asks for the events, and never reads one."""
    reader = socket.create_connection(("127.0.0.1", port))
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    reader.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return reader


def shown(run: Run, life: Any) -> int:
    """The port on which it says that it shows its dashboard."""
    return int(run.wait(lambda: re.search(r"dashboard address=http://127\.0\.0\.1:(\d+)/", life.said), "address")[1])


def test_it_shows_a_run_and_outlives_its_server(tmp_path: Path) -> None:
    port = free_port()
    dashboard = {"dashboard": f"http://127.0.0.1:{port}"}
    with Run(tmp_path / "run", sites={"a": 1, "b": 1}, samples=6_000, server=dashboard) as run:
        server = run.start_server()
        workers = run.start_workers(step_seconds=0.02)
        assert shown(run, server) == port
        assert run.status()["dashboard"] == f"http://127.0.0.1:{port}/"
        with reading(port) as events:
            name, first = next(events)
            assert name == "all"
            trained = [first["status"]["trained"]]
            while len(trained) < 3:
                _, later = next(events)
                trained.append(later["status"]["trained"])
                assert {"a", "b"} >= set(later["whole"]["sites"])
        assert sorted(set(trained)) == trained, "it grows"
        check_doors(port)
        server.kill()
        assert server.exit_code not in (0, None)
        again = run.start_server()
        assert shown(run, again) == port
        run.finish(again, *workers)
    history = load_history(run.config.directory / "history.json")
    assert history is not None
    assert history.counts["started"] == 1
    assert history.counts["finished"] == 1
    assert sum(history.staleness.values()) > 0
    assert history.whole.figures["trained"][-1] == 6_000
    check_report(run, tmp_path)


def check_doors(port: int) -> None:
    """Who may read, and that nobody may do more."""
    status, headers, page = ask(port, "/")
    assert status == 200
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "<title>" in page
    foreign = set(re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", page)) - {"http://www.w3.org"}
    assert not foreign, "it needs nobody else"
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert ask(port, "/", method)[0] == 405, method
        assert ask(port, "/events", method)[0] == 405, method
    for ours in ("localhost", f"127.0.0.1:{port}", "[::1]:80", "192.168.1.7"):
        assert ask(port, "/content.json", Host=ours)[0] == 200, ours
    for other in ("evil.example", f"rebound.example:{port}", "127.0.0.1.evil.example", "localhost.evil.example", ""):
        assert ask(port, "/content.json", Host=other)[0] == 421, other
    assert ask(port, "/../../etc/passwd")[0] == 404
    status, _, told = ask(port, "/metrics")
    assert (status, "# TYPE hetero_async_outer_steps_total counter" in told) == (200, True), told


def check_report(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    answer = forked(tmp_path, "report", "--run", run.config.directory, "--out", out)
    assert answer.exit_code == 0, answer.errors
    assert "tiny, finished" in answer.output
    content = json.loads(re.search(r'id="content">(.*?)</script>', out.read_text())[1])  # type: ignore[index]
    assert content["counts"]["started"] == 1
    assert content["status"]["trained"] == 6_000
    assert sum(count for _, count in content["staleness"]) == content["status"]["deltas"]["acknowledged"]
    assert sum(worker["samples"] for worker in content["status"]["workers"]) == 6_000
    assert all(worker["bytes_up"] > 0 for worker in content["status"]["workers"])


def test_readers_who_do_not_read_do_not_hold_up_a_run(tmp_path: Path) -> None:
    port = free_port()
    with Run(tmp_path, samples=3_000, server={"dashboard": f"http://127.0.0.1:{port}"}) as run:
        server = run.start_server()
        shown(run, server)
        readers = [silent_reader(port) for _ in range(READERS_MAX)]
        until(lambda: ask(port, "/events")[0] == 503, "no more readers are let in", PATIENCE_SECONDS, run.story)
        run.start_workers()
        run.finish()
        for reader in readers:
            reader.close()


def test_a_port_that_is_taken_is_passed_over(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", free_port()))) as taken:
        port = taken.getsockname()[1]
        with Run(tmp_path, samples=400, server={"dashboard": f"http://127.0.0.1:{port}"}) as run:
            server = run.start_server()
            run.start_workers()
            assert port < shown(run, server) < port + 20
            assert f"instead_of=http://127.0.0.1:{port}" in server.said
            run.finish()


def test_where_it_cannot_be_shown_the_run_goes_on(tmp_path: Path) -> None:
    with Run(tmp_path, samples=400, server={"dashboard": "http://192.0.2.1:7720"}) as run:
        server = run.start_server()
        run.start_workers()
        run.finish()
        assert re.search(r"no dashboard reason=192\.0\.2\.1:7720: .*assign", server.said)


@pytest.mark.parametrize(
    "line", ['dashboard = "7720"', 'dashboard = "https://localhost:7720"', 'dashboard = "http://:1"']
)
def test_an_address_that_is_none_is_told(tmp_path: Path, line: str) -> None:
    with Run(tmp_path / "run") as run:
        text = run.config.path.read_text()
    run.config.path.write_text(re.sub(r'^dashboard = ""', line, text, count=1, flags=re.MULTILINE))
    answer = forked(tmp_path, "status", "--run", run.config.path)
    assert answer.exit_code == 2
    assert "server.dashboard = " in answer.errors
    assert 'must be http://HOST:PORT, for example http://127.0.0.1:7720, or "" for none' in answer.errors
