"""How near the server's work on parameters comes to what memory allows: ingest and publish, and how they grow."""

import itertools
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import trio
from benchmarks.figures import Figures, in_turns, on_threads
from tensors.models import DELTA, Flat, Run, values

from hetero_async.core.records import Delta, Entry, RunSettings
from hetero_async.shell.log import FileLog
from hetero_async.shell.shelf import FileShelf
from hetero_async.shell.threads import in_thread
from hetero_async.tensors.codecs import encode_payload

MILLION = 1_000_000
CODEC = "int4"
CORES = os.cpu_count() or 1
WORKERS = 4  # whose deltas one merge takes in
SIZES = (10, 30, 100, 300)  # million parameters


class Server:
    """A server's model and log, on which a window of pushes and their merge is done as a server does it."""

    def __init__(self, numel: int, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self.run = Run(Flat(numel), RunSettings(run="bench", codec_up=CODEC, codec_down=CODEC), FileShelf(directory))
        self.model = self.run.server
        self.payloads = [encode_payload(CODEC, values(numel, seed=1))] * WORKERS  # what they say makes no difference
        self.log = FileLog.open(directory, "bench", in_thread)
        self._lsn = itertools.count(1)

    def window(self) -> None:
        """Admitted, logged and applied: a delta of each worker, then their merge."""
        self.push()
        self.run.step()
        self.run.entries.clear()
        self.log.drop_before(self.log.last_lsn)

    def push(self) -> None:
        for payload in self.payloads:
            facts = self.model.inspect(CODEC, payload)
            assert facts.refusal is None
            delta: Delta = replace(DELTA, codec=CODEC, norm=facts.norm)
            entry = Entry(lsn=next(self._lsn), term=1, record=delta, payload=payload)
            trio.run(self.log.append, [entry])
            self.run.take(delta, payload)

    def publish(self) -> None:
        self.run.publish(CODEC)
        self.run.entries.clear()


def pass_over(*vectors: torch.Tensor) -> None:
    """Read all, write all: the floor of memory traffic of an outer step."""
    for vector in vectors:
        vector.mul_(0.999)


def read_two_write_one(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.add(one, other, out=other)


def ingest(numel: int, directory: Path, turns: int) -> list[tuple[float, float]]:
    """Parameters of one delta a second: as the server does it, and at the floor."""
    with on_threads(CORES):
        server = Server(numel, directory)
        theta, momentum = torch.zeros(numel), torch.zeros(numel)
        measured = in_turns(server.window, partial(pass_over, theta, momentum), turns)
        server.log.close()
    return [(work / WORKERS, floor) for work, floor in measured]


@pytest.mark.timeout(600)
def test_ingest_and_scale(figures: Figures, tmp_path: Path) -> None:
    rates = {}
    for millions in SIZES:
        measured = ingest(millions * MILLION, tmp_path / str(millions), turns=5 if millions <= 100 else 3)
        rates[millions] = sorted(work for work, _ in measured)[len(measured) // 2] / millions
        goal = 4 if millions == 100 else None
        figures.add(f"ingest: {millions} M parameters, {CODEC}, a delta of {WORKERS}", measured, "s", at_most=goal)
    linear = [(rate, rates[SIZES[0]]) for rate in rates.values()]
    figures.add("scale: seconds a million parameters, largest model against smallest", linear[-1:], "s/M", at_most=1.15)


@pytest.mark.timeout(600)
def test_publish(figures: Figures, tmp_path: Path) -> None:
    numel = 100 * MILLION
    with on_threads(CORES):
        server = Server(numel, tmp_path)
        server.window()
        theta, shadow = torch.zeros(numel), torch.zeros(numel)
        measured = in_turns(server.publish, partial(read_two_write_one, theta, shadow))
        server.log.close()
    figures.add(f"publish: 100 M parameters, {CODEC}", measured, "s", at_most=5)
