"""A real browser that goes on, asked by the DevTools protocol over two pipes: JSON, a zero behind each message."""

import itertools
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class Tab:
    def __init__(self, requests: int, answers: int) -> None:
        self._requests = requests
        self._answers = answers
        self._numbers = itertools.count(1)
        self._read = b""
        self._session: dict[str, str] = {}

    def open(self, address: str) -> None:
        target = self._ask("Target.createTarget", url=address)["targetId"]
        self._session = {"sessionId": self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}

    def value(self, expression: str) -> Any:
        """Of JavaScript in the page, as JSON has it."""
        told = self._ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        asked = {"id": number, "method": method, "params": parameters, **self._session}
        os.write(self._requests, json.dumps(asked).encode() + b"\0")
        while True:
            while b"\0" not in self._read:
                more = os.read(self._answers, 65536)
                assert more, "the browser is gone"
                self._read += more
            message, _, self._read = self._read.partition(b"\0")
            answer = json.loads(message)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return dict(answer["result"])


@contextmanager
def tab(command: Sequence[str], complaints: int) -> Iterator[Tab]:
    """Of the browser that the command starts, whose standard error goes to that descriptor."""
    (theirs_in, requests), (answers, theirs_out) = os.pipe(), os.pipe()

    def as_it_expects_them() -> None:
        os.dup2(theirs_in, 3)
        os.dup2(theirs_out, 4)

    browser = subprocess.Popen(
        [*command, "--remote-debugging-pipe"], pass_fds=(3, 4), preexec_fn=as_it_expects_them, stderr=complaints
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Tab(requests, answers)
    finally:
        browser.kill()
        browser.wait()
        os.close(requests)
        os.close(answers)
