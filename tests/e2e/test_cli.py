"""The command line as a person uses it: real commands in real processes, from `init` to the exported model."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer
from e2e.commands import background
from e2e.harness import Run, forked, free_port, until
from e2e.tiny import NextByte, loss_on_all, seeded
from safetensors.torch import load_file

from hetero_async.cli import app
from hetero_async.config import RunConfig
from hetero_async.core.records import Delta, Joined
from hetero_async.shell.segments import read_log
from hetero_async.watch import metrics

VERBS = (
    "init", "serve", "standby", "promote", "work", "join-site", "join-standby", "keys", "status", "curves", "verify",
    "export", "restore", "repair", "report", "audit", "replay", "sim", "study", "plan", "doctor",
)  # fmt: skip
PROGRAM = [sys.executable, "-m", "hetero_async"]
SCRIPT = Path(__file__).with_name("tiny.py")
SECONDS_MAX = 90.0


def say(*words: object) -> str:
    """One command in a process of its own, and what it printed. It must end well."""
    command = [*PROGRAM, *map(str, words)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_MAX, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    return said.stdout


def test_a_verb_that_does_not_need_torch_does_not_wait_for_it() -> None:
    loaded = "import sys, hetero_async.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, check=True).stdout == b"False\n"


def test_a_run_from_init_to_export(tmp_path: Path) -> None:
    toml = tmp_path / "my-run" / "run.toml"
    address = f"tcp://127.0.0.1:{free_port()}"
    made = say("init", toml.parent, "--name", "tiny", "--site", "here=2", "--samples", 4000, "--address", address)
    assert f"next: hetero-async serve --run {toml}" in made
    toml.write_text(re.sub(r'^rule = "auto"', 'rule = "sgd"', toml.read_text(), flags=re.MULTILINE))
    outputs = tmp_path / "server.output", tmp_path / "here.output"
    hold = tmp_path / "hold"  # so that the run is not over before it was looked at
    script = ["--", sys.executable, SCRIPT, "--step-seconds", "0.01", "--hold", hold]
    with (
        background(outputs[0], *PROGRAM, "serve", "--run", toml, "--exit-when-finished") as server,
        background(
            outputs[1], *PROGRAM, "work", "--run", toml, "--site", "here", "--log-format", "json", *script
        ) as agent,
    ):
        story = functools.partial(told_in, outputs)
        log = toml.parent / "log"
        until(lambda: len(workers_in(log)) == 2, "both workers push", SECONDS_MAX, story)
        hold.touch()
        kill_worker_once(RunConfig.load(toml))
        until(lambda: joined_in(log).count("here-0") == 2, "the killed worker is back", SECONDS_MAX, story)
        status = json.loads(say("status", "--run", toml, "--json"))
        assert {worker["worker"] for worker in status["workers"]} == {"here-0", "here-1"}
        hold.unlink()
        assert (server.wait(SECONDS_MAX), agent.wait(SECONDS_MAX)) == (0, 0), story()
    assert "worker restarts" in story() and "signal SIGKILL" in story()
    events = [json.loads(line) for line in outputs[1].read_text().splitlines() if line.startswith("{")]
    assert {"here", "here-0", "here-1"} >= {event["process"] for event in events} >= {"here"}
    assert [event["worker"] for event in events if event["event"] == "worker started"].count("here-0") == 2
    was = forked(tmp_path, "status", "--run", toml)
    assert was.exit_code == 1 and "no server is running; this is what" in was.output and "finished" in was.output
    assert was.errors.startswith("error: no server answers on ")
    curves = forked(tmp_path, "curves", "--run", toml, "--tensorboard", tmp_path / "events")
    assert curves.exit_code == 0 and list((tmp_path / "events" / "run").glob("events.out.tfevents.*")), curves.errors
    verified = forked(tmp_path, "verify", toml.parent / "log")
    assert verified.exit_code == 0 and "verify      ok" in verified.output
    assert "samples     4000 trained, 0 counted twice" in verified.output
    out = tmp_path / "model.safetensors"
    assert forked(tmp_path, "export", out, "--run", toml).exit_code == 0
    model = NextByte()
    model.load_state_dict(load_file(out), strict=True)
    assert loss_on_all(model) < loss_on_all(seeded()) - 2


def told_in(outputs: Sequence[Path]) -> str:
    return "\n".join(path.read_text() for path in outputs)


def workers_in(log: Path) -> set[str]:
    """Who has a delta in the log."""
    entries = read_log(log, None) if list(log.glob("*.log")) else iter(())
    return {entry.record.worker for entry in entries if isinstance(entry.record, Delta)}


def joined_in(log: Path) -> list[str]:
    return [entry.record.worker for entry in read_log(log, None) if isinstance(entry.record, Joined)]


def kill_worker_once(config: RunConfig) -> None:
    os.kill(int((config.worker_directory("here-0") / "pid").read_text()), signal.SIGKILL)


@pytest.mark.parametrize("verb", VERBS)
def test_help_says_what_the_verb_does_and_shows_an_example(verb: str) -> None:
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    context = typer.Context(command, info_name=f"hetero-async {verb}")
    with context:
        text = command.get_help(context) or ""
    help_text = command.help or ""
    assert re.search(rf"Example: hetero-async {verb}\b", help_text), text
    assert len(help_text.split("Example:")[0].split()) >= 6


def test_every_verb_is_in_the_help(tmp_path: Path) -> None:
    assert set(typer.main.get_command(app).commands) == set(VERBS)  # type: ignore[attr-defined]
    shown = forked(tmp_path, "--help")
    assert shown.exit_code == 0
    assert all(verb in shown.output for verb in VERBS)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("serve --run absent.toml", "error: absent.toml: there is no such file; write one with: hetero-async init"),
        ("verify nowhere", "error: nowhere: there is no log here"),
        ("init x --site here", 'error: --site here: must be NAME=WORKERS, for example "--site amsterdam=2"'),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(tmp_path: Path, words: str, expected: str) -> None:
    said = forked(tmp_path, *words.split())
    assert (said.exit_code, said.errors) == (2, expected)


@pytest.mark.parametrize("words", ["export {out} --run run/run.toml", "replay run/log --out {out}"])
@pytest.mark.parametrize(
    ("out", "expected"),
    [
        ("absent/out.safetensors", "error: absent/out.safetensors: there is no directory absent; make it first"),
        ("run", "error: run is a directory; name the file to write"),
    ],
)
def test_a_model_that_cannot_be_written_there_is_an_error_before_any_log_is_read(
    tmp_path: Path, words: str, out: str, expected: str
) -> None:
    Run(tmp_path / "run")  # its log holds nothing yet, which would be the next error
    said = forked(tmp_path, *words.format(out=out).split())
    assert (said.exit_code, said.errors) == (2, expected)


def test_debug_shows_where_an_error_came_from(tmp_path: Path) -> None:
    said = forked(tmp_path, "--debug", "serve", "--run", "absent.toml")
    assert said.exit_code == 2
    assert "Traceback" in said.errors and "config.py" in said.errors
    assert said.errors.splitlines()[-1].startswith("error: absent.toml: there is no such file")


def test_an_unknown_site_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with Run(tmp_path / "run") as run:
        said = forked(tmp_path, "work", "--run", run.config.path, "--site", "mars", "--", "true")
        assert (said.exit_code, said.errors) == (2, 'error: run.toml knows no site "mars"; it has: here')


def test_status_draws_a_table_of_the_workers(tmp_path: Path) -> None:
    with Run(tmp_path / "run", samples=160) as run:
        run.start_server()
        run.start_workers(hold=str(tmp_path / "hold"))
        (tmp_path / "hold").touch()
        run.wait(lambda: len(run.records(Joined)) == 2, "both have joined")
        said = forked(tmp_path, "status", "--run", run.config.path)
        assert said.exit_code == 0
        assert all(word in said.output for word in ("tiny", "training", "here-0", "here-1", "steps/s")), said.output
        run.wait(lambda: all(one["usage"]["round_trip_seconds"] for one in run.status()["workers"]), "both beat twice")
        assert "hetero_async_workers 2.0" in metrics.render(run.status())
        (tmp_path / "hold").unlink()
        run.finish()


def test_status_without_a_server_says_so_and_how_to_start_one(tmp_path: Path) -> None:
    with Run(tmp_path / "run") as run:
        said = forked(tmp_path, "status", "--run", run.config.path)
        assert said.exit_code == 1
        assert said.errors == (
            f"error: no server answers on {run.config.directory}; "
            f"start it with: hetero-async serve --run {run.config.path}"
        )


def test_status_on_another_host_without_a_server_says_whom_it_asked(tmp_path: Path) -> None:
    with Run(tmp_path / "run") as run:
        (run.config.keys / "server.secret").unlink()
        said = forked(tmp_path, "status", "--run", run.config.path)
        assert said.exit_code == 1
        assert said.errors.splitlines()[-1] == f"error: no answer from {run.config.server.address} in 5 s"
        assert "Trying again until 5 s have passed" in said.errors and "until stopped" not in said.errors


def test_a_damaged_log_is_a_readable_line_with_its_own_exit_code(tmp_path: Path) -> None:
    with Run(tmp_path / "run", samples=160) as run:
        run.start_server()
        run.start_workers()
        run.finish()
        [segment] = run.config.log.glob("*.log")
        content = bytearray(segment.read_bytes())
        content[5000] ^= 1  # within the initial parameters
        segment.write_bytes(content)
        said = forked(tmp_path, "verify", run.config.log)
        assert said.exit_code == 65
        assert said.errors.startswith(f"error: {segment}: ") and len(said.errors.splitlines()) == 1


def test_an_interrupted_server_stops_and_goes_on_later(tmp_path: Path) -> None:
    hold = tmp_path / "hold"  # so that the run cannot end before the server is told to
    with Run(tmp_path / "run", samples=1600) as run:
        server = run.start_server()
        run.start_workers(step_seconds=0.005, hold=str(hold))
        run.wait(run.deltas, "a delta is admitted")
        hold.touch()
        server.signal(signal.SIGTERM)
        assert server.ending() == 0, server.said
        hold.unlink()
        run.start_server()
        run.finish()
