"""What a person reads who gives the software something it cannot use: one line, with the thing, and what to do."""

import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from e2e.harness import Life, Run
from e2e.tiny import BATCH, NextByte, Text, loss_of, seeded, train

import hetero_async as ha
from hetero_async import session
from hetero_async.config import ENV_RUN, ENV_WORKER
from hetero_async.errors import ConfigError
from hetero_async.session import JOIN_SECONDS


class Wider(NextByte):
    """As somebody else's version of the script would have it."""

    def __init__(self) -> None:
        super().__init__()
        self.output = torch.nn.Linear(12, 300)


def train_wider() -> None:
    model = seeded(Wider)
    session = ha.join(model, torch.optim.SGD(model.parameters(), lr=1.0))
    for text in session.batches(Text(), BATCH):
        loss_of(model, text).backward()


def train_changing(what: str) -> None:
    """Something grows or shrinks in the middle of the run."""
    model, text = seeded(), Text()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    session = ha.join(model, optimizer)
    for number, batch in enumerate(session.batches(text, BATCH)):
        loss_of(model, batch).backward()
        optimizer.step()
        if number == 2 and what == "optimizer":
            optimizer.add_param_group({"params": torch.nn.Linear(12, 5).parameters()})
        if number == 2 and what == "model":
            model.head = torch.nn.Linear(12, 5)
        if number == 2 and what == "dataset":
            text.samples -= 1


def edit(run: Run, pattern: str, replacement: str) -> None:
    text, count = re.subn(pattern, replacement, run.config.path.read_text(), flags=re.MULTILINE)
    assert count == 1, pattern
    run.config.path.write_text(text)


def complaint(life: Life, exit_code: int) -> str:
    """The one line of a process that gave up."""
    assert life.ending() == exit_code, life.said
    lines = [line for line in life.said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in life.said, life.said
    return lines[0]


def last_line(life: Life) -> str:
    """Of a training script, which is the user's: its error comes with Python's traceback above it."""
    assert life.ending() == 1, life.said
    return life.said.splitlines()[-1]


def begun(run: Run, worker: str, hold: Path) -> Path:
    """Let the worker begin the run, and keep it from ending it as long as the file is there."""
    run.start_worker(worker, step_seconds=0.005, hold=str(hold))
    run.wait(lambda: run.deltas(worker), "the run has a model and a dataset")
    hold.touch()
    return hold


def remove_secret(run: Run) -> None:
    (run.config.keys / "server.secret").unlink()


def truncate_secret(run: Run) -> None:
    secret = run.config.keys / "server.secret"
    secret.write_bytes(secret.read_bytes()[:30])


def mix_up_keys(run: Run) -> None:
    (run.config.keys / "server.secret").write_bytes((run.config.keys / "server.public").read_bytes())


def rename_run(run: Run) -> None:
    edit(run, r'^name = "tiny"', 'name = "other"')


def change_seed(run: Run) -> None:
    edit(run, r"^seed = 0", "seed = 7")


def misspell(run: Run) -> None:
    edit(run, r"^seed = 0", "sede = 0")


def mistype(run: Run) -> None:
    edit(run, r"^momentum = \S+", 'momentum = "much"')


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (misspell, r"run\.toml: run\.sede = 0: unknown key \(did you mean seed\?\); known keys: name, "),
        (mistype, r'run\.toml: training\.momentum = "much": must be a number at least 0 and less than 1'),
        (remove_secret, r"server\.secret: there is no such key file; copy it from where `hetero-async init` ran"),
        (
            truncate_secret,
            r"server\.secret: is not a key file; it must be one line, \"curve-secret \" and 40 characters",
        ),
        (mix_up_keys, r"server\.secret: this is a curve-public key, and a curve-secret key is needed here"),
    ],
)
def test_a_server_says_what_is_wrong_with_its_files(
    tmp_path: Path, spoil: Callable[[Run], None], expected: str
) -> None:
    with Run(tmp_path / "run") as run:
        spoil(run)
        assert re.search(expected, complaint(run.start_server(), 2))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (rename_run, r'belongs to run "tiny", not "other": use another directory'),
        (change_seed, r"holds a run with seed = 0, and run\.toml says 7: .* put it back, or choose another"),
    ],
)
def test_a_server_refuses_what_does_not_fit_its_directory(
    tmp_path: Path, spoil: Callable[[Run], None], expected: str
) -> None:
    with Run(tmp_path / "run", samples=160) as run:
        run.start_server()
        run.start_workers()
        run.finish()
        spoil(run)
        assert re.search(expected, complaint(run.start_server(), 2))


def test_two_servers_never_share_a_directory(tmp_path: Path) -> None:
    with Run(tmp_path / "run") as run:
        first = run.start_server()
        run.wait(lambda: "serving" in first.said, "the first serves")
        assert "log is in use by another server: stop that one, or use another" in complaint(run.start_server(), 2)
        assert first.exit_code is None


@pytest.mark.parametrize("setting", ["address", "bulk_address"])
def test_a_port_that_is_taken_is_named_with_its_setting(tmp_path: Path, setting: str) -> None:
    with Run(tmp_path / "run") as run, socket.socket() as other:
        address = getattr(run.config.server, setting)
        other.bind(("127.0.0.1", int(address.rsplit(":")[-1])))
        other.listen()
        line = complaint(run.start_server(), 2)
        assert f"address {address} is already in use; stop the other server or change server.{setting} in" in line


def test_a_model_that_differs_is_refused_by_its_tensor(tmp_path: Path) -> None:
    with Run(tmp_path / "run", samples=1600) as run:
        first, second = run.names
        run.start_server()
        hold = begun(run, first, tmp_path / "hold")
        expected = (
            "RefusedError: the model differs from the run's: tensor output.weight: expected [256, 12], found [300, 12]"
        )
        assert expected in last_line(run.start_worker(second, train_wider))
        hold.unlink()
        run.finish()


def test_a_dataset_of_another_length_is_refused_with_both_lengths(tmp_path: Path) -> None:
    with Run(tmp_path / "run", samples=1600) as run:
        first, second = run.names
        run.start_server()
        hold = begun(run, first, tmp_path / "hold")
        expected = "RefusedError: the dataset has 1999 samples here, but the run's has 2000"
        assert expected in last_line(run.start_worker(second, samples=1999))
        hold.unlink()
        run.finish()


def test_a_dataset_smaller_than_a_batch_is_refused(tmp_path: Path) -> None:
    with Run(tmp_path / "run", workers=1) as run:
        run.start_server()
        expected = "DatasetError: the dataset has 5 samples, fewer than one batch of 8"
        assert expected in last_line(run.start_worker(run.names[0], samples=5))


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("optimizer", "SchemaError: the optimizer trains a parameter (5, 12) (group 1, place 0), which is none of"),
        ("model", "SchemaError: head.weight requires a gradient and did not when the model joined: nobody else would"),
        ("dataset", "DatasetError: the dataset had 2000 samples when training began and has 1999 now: it must stay"),
    ],
)
def test_what_changes_in_the_middle_of_a_run_is_told_after_a_round(tmp_path: Path, what: str, expected: str) -> None:
    with Run(tmp_path / "run", workers=1) as run:
        run.start_server()
        assert expected in last_line(run.start_worker(run.names[0], train_changing, what=what))


def test_a_worker_without_a_server_says_where_it_looks_and_for_how_long_it_will(tmp_path: Path) -> None:
    with Run(tmp_path / "run", samples=1600) as run:
        first, second = run.names
        address = re.escape(run.config.server.address)
        worker, impatient = run.start_worker(first, hold=str(tmp_path / "hold")), run.start_worker(second, give_up_soon)
        missed = (
            rf"server not reached address={address} .*next_try_seconds=[\d.]+ reason=nobody answers .* Trying again "
        )
        left = run.wait(lambda: re.search(missed + r"for (\d+) s, then giving up$", worker.said, re.M), "it complains")
        assert JOIN_SECONDS - 60 < int(left[1]) <= JOIN_SECONDS
        assert last_line(impatient).endswith(
            f"UserError: could not join the run at {run.config.server.address} in 4 s; is its server running?"
        )
        assert re.search(missed + r"for [0-4] s, then giving up$", impatient.said, re.M), impatient.said
        assert re.search(rf"{second}: joining {address}: no answer yet. Trying for [0-4] s, then g", impatient.said)
        (tmp_path / "hold").touch()
        server = run.start_server()  # and the other one meant it
        run.wait(lambda: (tmp_path / f"hold.reached-{first}").exists(), "it has joined")
        server.kill()
        run.wait(lambda: re.search(missed + r"until stopped$", worker.said, re.M), "it does not give up any more")
        (tmp_path / "hold").unlink()
        run.finish(worker, run.start_server())


def give_up_soon() -> None:
    session.JOIN_SECONDS, session.TELL_SECONDS = 4.0, 0.1
    train()


def test_a_script_that_was_not_started_as_a_worker_says_how_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV_RUN, raising=False)
    monkeypatch.delenv(ENV_WORKER, raising=False)
    model = NextByte()
    with pytest.raises(ConfigError, match=r"start this script with: hetero-async work --site NAME -- python train.py"):
        ha.join(model, torch.optim.SGD(model.parameters(), lr=1.0))


def test_a_worker_that_run_toml_does_not_know_is_told_whom_it_knows(tmp_path: Path) -> None:
    with Run(tmp_path / "run") as run:
        said = last_line(run.start_worker("here-7"))
        assert 'HETERO_ASYNC_WORKER = "here-7": must be one of here-0, here-1' in said


def test_a_secret_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    with Run(tmp_path / "run") as run:
        secret = run.config.keys / "server.secret"
        secret.chmod(0o644)
        assert f"{secret}: others can read this secret key (mode 644); do: chmod 600" in complaint(
            run.start_server(), 2
        )


def test_a_directory_that_has_a_run_is_not_written_over(tmp_path: Path) -> None:
    with Run(tmp_path / "run") as run:
        before = run.config.path.read_text()
        with pytest.raises(ConfigError, match=r"run\.toml: there is one already; remove it, or choose another"):
            Run(tmp_path / "run")
        assert run.config.path.read_text() == before


def test_a_key_that_is_not_admitted_is_kept_out_and_complained_about(tmp_path: Path) -> None:
    with Run(tmp_path / "run", workers=1) as run, Run(tmp_path / "stranger", workers=1) as stranger:
        shutil.copy(stranger.config.keys / "here-0.secret", run.config.keys / "here-0.secret")
        server = run.start_server()
        # One that is answered late hangs up, and is told of as a stranger; then its key is only in the minute's sum.
        run.wait(lambda: "serving run=" in server.said, "it serves")
        run.start_worker("here-0")
        run.wait(lambda: "refused key" in server.said and "not in allowed.json" in server.said, "the server complains")
        assert not list(run.entries())
