"""A real run looked at afterwards: who contributed what, who was refused, and what it would be without one of them."""

import json
from pathlib import Path

import torch
from e2e.harness import Run, forked
from safetensors.torch import load_file

from hetero_async.core.ranges import size
from hetero_async.shell.keys import load_public


def test_who_contributed_what_and_the_run_without_one_of_them(tmp_path: Path) -> None:
    with Run(tmp_path / "run", max_staleness=0, rule="sgd", codec_up="fp32") as run:
        run.start_server()
        workers = run.start_workers(step_seconds=0.002)
        run.finish()
        said = forked(tmp_path, "audit", run.config.log, "--json")
        assert said.exit_code == 0, said.errors
        rows = {row["worker"]: row for row in json.loads(said.output)["rows"]}
        for worker, life in zip(run.names, workers, strict=True):
            deltas = run.deltas(worker)
            assert rows[worker]["key"] == load_public(run.config.keys / f"{worker}.public").decode()
            assert rows[worker]["deltas"] == len(deltas)
            assert rows[worker]["samples"] == sum(size(delta.ranges) for delta in deltas)
            assert rows[worker]["norms"]["max"] == max(delta.norm for delta in deltas)
            refused = life.said.count("delta refused")
            assert sum(rows[worker]["refused"].values()) >= refused, "an answer may be lost, a note of it is not"
            assert all(kind.startswith("too stale: ") for kind in rows[worker]["refused"])
        assert any(row["refused"] for row in rows.values()), run.story()

        table = forked(tmp_path, "audit", run.config.log)
        assert rows["here-0"]["key"][:8] in table.output and "too stale: … versions behind" in table.output

        whole, less = tmp_path / "whole.safetensors", tmp_path / "less.safetensors"
        said = forked(tmp_path, "replay", run.config.log, "--out", whole)
        assert said.exit_code == 0 and "left out         0 deltas, 0 samples" in said.output, said.errors
        assert forked(tmp_path, "export", tmp_path / "run.safetensors", "--run", run.config.path).exit_code == 0
        assert whole.read_bytes() == (tmp_path / "run.safetensors").read_bytes()

        said = forked(tmp_path, "replay", run.config.log, f"--without={rows['here-1']['key']}", "--out", less)
        assert said.exit_code == 0, said.errors
        assert f"left out         {rows['here-1']['deltas']} deltas, {rows['here-1']['samples']} samples" in said.output
        first, second = load_file(whole), load_file(less)
        assert first.keys() == second.keys()
        assert not all(torch.equal(first[name], second[name]) for name in first)

        said = forked(tmp_path, "replay", run.config.log, "--without", "mars-0")
        assert said.exit_code == 2
        assert said.errors.startswith("error: --without mars-0: no such worker or key in this log; it has: here-")
        said = forked(tmp_path, "replay", run.config.log, "--out", tmp_path / "nowhere" / "x")
        assert (said.exit_code, said.errors.endswith("make it first")) == (2, True)
