"""A site that knows nothing but an address joins a running server; keys change while a run goes on. Real processes."""

import functools
import json
import os
import re
import shlex
import signal
import sys
from pathlib import Path

from e2e.harness import Run, forked, free_port, until
from e2e.test_cli import PROGRAM, SCRIPT, SECONDS_MAX, background, told_in, workers_in

from hetero_async.config import RunConfig
from hetero_async.core.records import Delta, Joined
from hetero_async.shell.keys import public_of
from hetero_async.shell.log import read_log


def allow_line_in(output: Path) -> list[str]:
    """The words that the site prints for the server's operator, as a shell understands them; none yet is none."""
    found = re.findall(r"^ +(hetero-async keys allow .*)$", output.read_text(), flags=re.MULTILINE)
    return shlex.split(found[-1])[1:] if found else []


def test_a_site_joins_with_two_commands_a_side_and_goes_on_after_it_was_killed(tmp_path: Path) -> None:
    server_run, far = tmp_path / "server" / "run.toml", tmp_path / "far"
    address = f"tcp://127.0.0.1:{free_port()}"
    made = forked(tmp_path, "init", server_run.parent, "--name", "tiny", "--samples", 6000, "--address", address)
    [joining] = re.findall(r"^ +(hetero-async join-site .*)$", made.output, flags=re.MULTILINE)
    with_key = shlex.split(joining)[2]
    assert with_key.startswith(f"{address}#")
    outputs = [tmp_path / f"{name}.output" for name in ("server", "far-first", "far-again")]
    story = functools.partial(told_in, [path for path in outputs if path.exists()])
    script = ["--", sys.executable, SCRIPT, "--step-seconds", "0.01"]
    words = [*PROGRAM, "join-site", with_key, "--site", "far", "--workers", 2, far, *script]
    log = server_run.parent / "log"
    with background(outputs[0], *PROGRAM, "serve", "--run", server_run, "--exit-when-finished") as server:
        with background(outputs[1], *words) as first:
            until(lambda: "does not let this key in" in outputs[1].read_text(), "it waits", SECONDS_MAX, story)
            assert not (far / "run.toml").exists() and first.poll() is None
            line = allow_line_in(outputs[1])
            assert forked(tmp_path, *line, "--run", server_run).exit_code == 0
            until(lambda: len(workers_in(log)) == 2, "both workers push", SECONDS_MAX, story)
            keys = {path.name: path.read_bytes() for path in (far / "keys").iterdir()}
            os.killpg(first.pid, signal.SIGKILL)
            first.wait()
        with background(outputs[2], *words) as again:
            asked = [forked(tmp_path, "status", "--json", "--run", run) for run in (server_run, far / "run.toml")]
            for status in asked:
                assert {worker["worker"] for worker in json.loads(status.output)["workers"]} == {"far-0", "far-1"}
            assert (again.wait(SECONDS_MAX), server.wait(SECONDS_MAX)) == (0, 0), story()
    assert {path.name: path.read_bytes() for path in (far / "keys").iterdir()} == keys
    assert not allow_line_in(outputs[2]), "it is let in already, and has nothing to ask of anybody"
    assert {record.incarnation for record in joined(log)} >= {1, 2}
    verified = forked(tmp_path, "verify", log)
    assert "samples     6000 trained, 0 counted twice" in verified.output, verified


def joined(log: Path) -> list[Joined]:
    return [entry.record for entry in read_log(log, None) if isinstance(entry.record, Joined)]


def test_a_worker_whose_key_is_revoked_is_not_heard_any_more_and_the_run_goes_on_without_it(tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    with Run(tmp_path / "run", samples=4000) as run:
        shut_out, other = run.names
        server = run.start_server()
        lives = [run.start_worker(name, awaited=run.names, step_seconds=0.01, hold=str(hold)) for name in run.names]
        run.wait(lambda: all(map(run.deltas, run.names)), "both have pushed")
        said = forked(tmp_path, "keys", "revoke", shut_out, "--run", run.config.path)
        key = public_of(run.config.keys / shut_out).decode()
        assert said.output == f"shut out {shut_out}: {key} is refused from now on\n"
        told = rf"refused message key={re.escape(key)} reason=its key is not in allowed\.json any more"
        run.wait(lambda: re.search(told, server.said), "the server refuses its next message")
        before = len(run.deltas(other))
        run.wait(lambda: len(run.deltas(other)) > before, "what was under way is decided")
        counted = len(run.deltas(shut_out))
        hold.touch()
        run.wait(lambda: "the server does not let this key in" in lives[0].said, "it is told why")
        hold.unlink()
        verdict = run.finish(server, lives[1])
        assert len(run.deltas(shut_out)) == counted
        assert verdict.samples == 4000


def test_a_worker_s_key_is_renewed_while_it_trains(tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    with Run(tmp_path / "run", samples=1600) as run:
        worker, other = run.names
        run.start_server()
        lives = [run.start_worker(name, awaited=run.names, step_seconds=0.01, hold=str(hold)) for name in run.names]
        run.wait(lambda: all(map(run.deltas, run.names)), "both have pushed")
        hold.touch()
        old = public_of(run.config.keys / worker)
        assert forked(tmp_path, "keys", "rotate", worker, "--run", run.config.path).exit_code == 0
        assert public_of(run.config.keys / worker) != old
        run.wait(lambda: joins_of(run, worker) == [1, 2], "it is back, after the server had given it up")
        assert lives[0].exit_code is None, "the same process"
        hold.unlink()
        counted = len(run.deltas(worker))
        run.finish()
        assert len(run.deltas(worker)) > counted
        assert {record.worker for record in run.records(Delta)} == {worker, other}


def joins_of(run: Run, worker: str) -> list[int]:
    return [record.incarnation for record in run.records(Joined) if record.worker == worker]


def test_keys_are_listed_with_the_line_by_which_another_site_joins(tmp_path: Path) -> None:
    with Run(tmp_path / "run") as run:
        said = forked(tmp_path, "keys", "list", "--run", run.config.path)
        for name in ("operator", *run.names):
            assert re.search(rf"{name} +{re.escape(public_of(run.config.keys / name).decode())}", said.output)
        address = f"{run.config.server.address}#{public_of(run.config.keys / 'server').decode()}"
        assert f"hetero-async join-site '{address}' --site NAME" in said.output
        lines = forked(tmp_path, "keys", "list", "--json", "--run", run.config.path).output.splitlines()
        assert [json.loads(line)["name"] for line in lines][-2:] == run.names


def test_a_site_that_joins_without_a_script_is_told_how_to_start_its_workers(tmp_path: Path) -> None:
    with Run(tmp_path / "run") as run:
        run.start_server()
        site = tmp_path / "here"
        site.mkdir()
        (site / "keys").mkdir()
        for name in run.names:
            for suffix in (".secret", ".public"):
                (site / "keys" / f"{name}{suffix}").write_bytes((run.config.keys / f"{name}{suffix}").read_bytes())
                (site / "keys" / f"{name}{suffix}").chmod(0o600)
        address = f"{run.config.server.address}#{public_of(run.config.keys / 'server').decode()}"
        said = forked(tmp_path, "join-site", address, "--site", "here", "--workers", 2, "here")
        assert said.exit_code == 0, said
        assert "next: hetero-async work --run here/run.toml --site here -- python train.py" in said.output
        assert RunConfig.load(site / "run.toml").workers() == run.config.workers()
