"""A real S3 server on loopback (moto's, in a process of its own), and a proxy before it that fails to order."""

import contextlib
import http.client
import itertools
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

SERVER = "import sys; from moto.server import main; main(['-H', '127.0.0.1', '-p', '0'])"
HOP_HEADERS = {"connection", "transfer-encoding", "content-length", "date", "server"}
BUCKETS = itertools.count(1)
STATUSES = {"409": "ConditionalRequestConflict", "412": "PreconditionFailed", "500": "InternalError", "503": "SlowDown"}
# Of one request; the proxy's silence is longer.
REQUEST_SECONDS = 2.0


@contextlib.contextmanager
def s3_server() -> Iterator[int]:
    """The port it listens on."""
    process = subprocess.Popen([sys.executable, "-c", SERVER], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        assert process.stderr is not None
        yield next(int(found[1]) for line in process.stderr if (found := re.search(rb"127\.0\.0\.1:(\d+)", line)))
    finally:
        process.kill()
        process.communicate()


class Proxy(ThreadingHTTPServer):
    """`faults`: what happens to the next requests of this method, one each; "" passes. `seen`: what came."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Passing)
        self.port = port
        self.method = "PUT"
        self.faults: deque[str] = deque()
        self.seen: list[str] = []
        self.is_over = threading.Event()

    def fault(self, method: str) -> str:
        return self.faults.popleft() if method == self.method and self.faults else ""


class Passing(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def pass_on(self) -> None:
        content = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.seen.append(f"{self.command} {self.path}")
        fault = self.server.fault(self.command)
        if fault in STATUSES:
            self.answer(int(fault), {}, f"<Error><Code>{STATUSES[fault]}</Code></Error>".encode())
        elif fault == "silent":
            self.server.is_over.wait(30 * REQUEST_SECONDS)
            self.close_connection = True
        elif fault == "torn before":
            self.close_connection = True
        else:
            upstream = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30)
            upstream.request(self.command, self.path, content, dict(self.headers))
            answer = upstream.getresponse()
            body = answer.read()
            upstream.close()
            if fault == "torn after":  # it was done, and nobody hears of it
                self.close_connection = True
            elif fault == "torn within":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + body[: len(body) // 2])
                self.close_connection = True
            else:
                self.answer(answer.status, dict(answer.getheaders()), body)

    do_PUT = do_GET = do_HEAD = do_DELETE = do_POST = pass_on  # noqa: N815, the names that http.server looks for

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in HOP_HEADERS:
                self.send_header(name, value)
        size = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", size)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def proxied(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Proxy, str]]:
    """A proxy and the URL of an empty bucket behind it, with an environment in which obstore finds it."""
    bucket = f"bucket-{next(BUCKETS)}"
    direct = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    direct.request("PUT", f"/{bucket}")
    assert direct.getresponse().status == 200
    direct.close()
    proxy = Proxy(port)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    for name, value in {
        "ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_address[1]}",
        "ALLOW_HTTP": "true",
        "ACCESS_KEY_ID": "somebody",
        "SECRET_ACCESS_KEY": "secret",
        "REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    try:
        yield proxy, f"s3://{bucket}/some/prefix"
    finally:
        proxy.is_over.set()
        proxy.shutdown()
        thread.join()
        proxy.server_close()
