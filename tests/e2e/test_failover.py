"""The server's site is lost, with real processes: its standby takes over, at the operator's word or by itself."""

import json
import shutil
import signal
from pathlib import Path

import trio
from e2e.harness import Run, forked
from etcd_local import LocalCluster
from shell.etcd_cluster import etcd, etcd_of_module  # noqa: F401, fixtures

from hetero_async import asking, looking
from hetero_async.core.records import Delta, Promoted
from hetero_async.shell.segments import end_of, first_lsn_of, segment_paths
from hetero_async.watch.verify import Verdict

EXIT_DEPOSED = 69
REPLICATED = {"durability": "replicated"}
STEP_SECONDS = 0.005
# More than a round is stretched to, so that one ends before the loops are held, however fast they are.
STEPS_BEFORE_HOLD = 40


def promote(run: Run, name: str) -> list[str]:
    return trio.run(asking.promote, run.config, name, False)


def wait_until_level(run: Run, name: str) -> None:
    """That one follows, and has all that the server has."""

    def is_level() -> bool:
        standbys = {standby["standby"]: standby for standby in run.status().get("standbys", [])}
        return name in standbys and standbys[name]["in_reach"] and standbys[name]["lag"] == 0

    run.wait(is_level, f"{name} is level")


def lag_of(run: Run, name: str) -> int:
    """In records, as the server's status has it."""
    return {standby["standby"]: standby["lag"] for standby in run.status()["standbys"]}[name]


def host_of(run: Run, name: str, directory: Path) -> Path:
    """The run.toml on that node's own host, where no other node's key lies."""
    node = run.config.node(name)
    (directory / "keys").mkdir(parents=True)
    shutil.copy(run.config.keys / f"{name}.secret", directory / "keys")
    (directory / node.directory.name).symlink_to(node.directory)
    return Path(shutil.copy(run.config.path, directory))


def has_genesis(run: Run, node: str) -> bool:
    return first_lsn_of(segment_paths(run.config.node(node).log)[0]) == 1


def finish(run: Run, serving: str, follower: str) -> Verdict:
    """Let the workers end, then the two servers when they are level; both logs are the same run to the bit."""
    names = set(run.names)
    workers = [life for life in run.lives if life.name in names]
    nodes = {life.name: life for life in run.lives if life.name not in names}  # of each the last life
    for worker in workers:
        assert worker.ending() == 0, run.story()
    wait_until_level(run, follower)
    for name in (follower, serving):
        nodes[name].signal(signal.SIGTERM)
        assert nodes[name].ending() == 0, run.story()
    verdict, other = run.check(serving), run.check(follower)
    assert (verdict.state.digest(), verdict.model_hash) == (other.state.digest(), other.model_hash)
    return verdict


def test_a_standby_takes_over_at_the_operators_word_and_the_deposed_server_follows_it(tmp_path: Path) -> None:
    with Run(tmp_path / "run", standbys=["b"], server=REPLICATED) as run:
        # What the server dies with is durable there, and confirmed by nobody.
        server = run.start_server(die_after_delta=6)
        run.start_standby("b", exit_when_finished=False)
        run.start_workers(step_seconds=STEP_SECONDS)
        assert server.ending() == -signal.SIGKILL
        assert len(run.deltas(node="b")) < len(run.deltas()) == 6
        assert promote(run, "b") == []
        run.wait(lambda: run.records(Promoted, "b"), "b serves")
        again = run.start_server()
        assert again.ending() == EXIT_DEPOSED
        assert "error: b follows or serves in term 2" in again.said and "standby --name server" in again.said
        rejoined = run.start_standby("server", exit_when_finished=False)
        verdict = finish(run, serving="b", follower="server")
        assert (verdict.state.term, verdict.state.server, verdict.lost) == (2, "b", [])
        assert verdict.acknowledged > 5
        assert "cut lsn=" in rejoined.said and list(run.config.log.glob("*.cut*"))


def test_a_standby_takes_over_by_itself_when_the_witness_knows_it_to_have_everything(
    tmp_path: Path,
    etcd: LocalCluster,  # noqa: F811
) -> None:
    witness = {"etcd": etcd.urls, "lease_seconds": 1.0}
    rules = {**REPLICATED, "when_alone": "continue"}
    hold = tmp_path / "hold"  # so that the run is not over before there is a standby
    with Run(tmp_path / "run", standbys=["b"], server=rules, witness=witness) as run:
        server = run.start_server()
        run.start_standby("b")
        hold.touch()
        run.start_workers(step_seconds=STEP_SECONDS, hold=str(hold))
        run.wait(lambda: run.status().get("partner") == "b", "b is the partner")
        hold.unlink()
        run.wait(lambda: len(run.deltas(node="b")) > 3, "b has some of it")
        server.kill()
        run.wait(lambda: run.records(Promoted, "b"), "b serves")
        verdict = run.finish(node="b")
        assert (verdict.state.term, verdict.state.server, verdict.lost) == (2, "b", [])
        assert {entry.term for entry in run.entries("b") if isinstance(entry.record, Delta)} == {1, 2}


def test_a_standby_begins_behind_a_checkpoint_where_the_log_has_been_dropped(tmp_path: Path) -> None:
    hold = tmp_path / "hold"  # so that there is something left to follow
    settings = {"checkpoint_every": 1, "keep_log": False}
    with Run(tmp_path / "run", standbys=["b"], server=settings) as run:
        server = run.start_server(segment_bytes=1 << 16)
        run.start_workers(step_seconds=STEP_SECONDS, hold=str(hold))
        run.wait(lambda: run.deltas() and not has_genesis(run, "server"), "the log's beginning is dropped")
        hold.touch()
        server.kill()  # which could still give it from memory
        run.start_server(segment_bytes=1 << 16, exit_when_finished=False)
        standby = run.start_standby("b")
        wait_until_level(run, "b")
        hold.unlink()
        finish(run, serving="server", follower="b")
        assert "checkpoint fetched" in standby.said and not has_genesis(run, "b")


def test_a_server_in_reach_hands_over_and_nothing_is_lost_even_with_local_durability(tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    with Run(tmp_path / "run", standbys=["b"]) as run:
        server = run.start_server()
        run.start_standby("b")
        hold.touch()
        run.start_workers(step_seconds=STEP_SECONDS, hold=str(hold))
        wait_until_level(run, "b")
        hold.unlink()
        run.wait(lambda: len(run.deltas(node="b")) > 3, "b has some of it")
        assert promote(run, "b") == []
        assert server.ending() == EXIT_DEPOSED
        assert "b takes over: this server stops; start it again as a standby" in server.said
        verdict = run.finish(node="b")
        assert (verdict.state.term, verdict.state.server, verdict.lost) == (2, "b", [])
        [promoted] = [entry.lsn for entry in run.entries("b") if isinstance(entry.record, Promoted)]
        assert end_of(run.config.log) == (1, promoted - 1), "the old log ends where the new term begins"
        exported = looking.export(run.config, tmp_path / "model.safetensors")
        assert exported.digest() == verdict.state.digest(), "not what the deposed server has"


def test_acknowledgements_pause_while_no_standby_is_in_reach_and_go_on_when_one_comes(tmp_path: Path) -> None:
    hold = tmp_path / "hold"  # so that the run is not over before the standby is gone
    with Run(tmp_path / "run", standbys=["b"], server=REPLICATED) as run:
        run.start_server(exit_when_finished=False)
        standby = run.start_standby("b")
        run.start_workers(step_seconds=STEP_SECONDS, hold=str(hold))
        run.wait(lambda: all(run.acknowledged(worker) for worker in run.names), "acknowledgements come")
        hold.touch()
        standby.kill()
        hold.unlink()
        confirmed = len(run.deltas(node="b"))
        run.wait(lambda: "no standby is in reach" in run.status()["state"], "the status says why they pause")
        run.wait(lambda: len(run.deltas()) > confirmed, "workers train on")
        assert sum(len(run.acknowledged(worker)) for worker in run.names) <= confirmed
        run.start_standby("b")
        verdict = finish(run, serving="server", follower="b")
        assert verdict.acknowledged > confirmed


def test_a_standby_that_was_frozen_kept_nobody_waiting_catches_up_and_answers_whoever_looks_there(
    tmp_path: Path,
) -> None:
    hold = tmp_path / "hold"
    with Run(tmp_path / "run", standbys=["b"]) as run:
        server, standby = run.start_server(), run.start_standby("b")
        wait_until_level(run, "b")
        standby.signal(signal.SIGSTOP)
        hold.touch()
        run.start_workers(hold=str(hold), hold_after=STEPS_BEFORE_HOLD)
        run.wait(lambda: all(run.acknowledged(worker) for worker in run.names), "acknowledgements come all the same")
        assert lag_of(run, "b") > 0
        standby.signal(signal.SIGCONT)
        wait_until_level(run, "b")
        look_at_a_standby(run, tmp_path)
        server.kill()
        promote_in_spite(run, tmp_path)
        hold.unlink()
        verdict = run.finish(node="b")
        assert (verdict.state.term, verdict.state.server, verdict.lost) == (2, "b", [])


def look_at_a_standby(run: Run, tmp_path: Path) -> None:
    """Status and export, where it runs, while it follows."""
    toml = host_of(run, "b", tmp_path / "host-of-b")
    shown = " ".join(forked(tmp_path, "status", "--run", toml).output.split())
    assert "standing by for server, 0 records behind" in shown and "told by standby b" in shown
    told = json.loads(forked(tmp_path, "status", "--run", toml, "--json").output)
    assert (told["standby"]["name"], told["standby"]["server"], told["standby"]["lag"]) == ("b", "server", 0)
    assert told["state_hash"] == run.status()["state_hash"]
    out, expected = tmp_path / "from-b.safetensors", tmp_path / "from-server.safetensors"
    said = forked(tmp_path, "export", out, "--run", toml)
    assert said.output == f"wrote {out}: version {told['version']}\n", said.errors
    looking.export(run.config, expected)
    assert out.read_bytes() == expected.read_bytes()


def promote_in_spite(run: Run, tmp_path: Path) -> None:
    """The server is gone, and nobody knows what it has alone: the operator is told, and asked."""
    words = "promote", "--name", "b", "--run", run.config.path
    refused = forked(tmp_path, *words, typed="n\n")
    assert "server cannot be asked: what it alone has written down would be lost, 0 records when" in refused.output
    assert "make b the server all the same? [y/N]" in refused.output
    assert (refused.exit_code, refused.errors) == (2, "error: b stays a standby")
    assert not run.records(Promoted, "b") and "standby" in run.status()
    promoted = forked(tmp_path, *words, "--yes")
    assert promoted.output == f"b takes over; see it with: hetero-async status --run {run.config.path}\n"
    assert promoted.exit_code == 0, promoted.errors
    run.wait(lambda: run.records(Promoted, "b"), "b serves")


def test_a_server_and_its_standby_that_die_together_come_back_with_all_that_was_acknowledged(tmp_path: Path) -> None:
    with Run(tmp_path / "run", standbys=["b"], server=REPLICATED) as run:
        nodes = [run.start_server(), run.start_standby("b")]
        run.start_workers(step_seconds=STEP_SECONDS)
        run.wait(lambda: all(run.acknowledged(worker) for worker in run.names), "acknowledgements come")
        for node in nodes:
            node.signal(signal.SIGKILL)
        for node in nodes:
            node.kill()
        acknowledged = {(worker, seq) for worker in run.names for seq in run.acknowledged(worker)}
        run.start_server(exit_when_finished=False)
        run.start_standby("b", exit_when_finished=False)
        verdict = finish(run, serving="server", follower="b")
        assert acknowledged <= verdict.deltas.keys() and verdict.acknowledged > len(acknowledged)
