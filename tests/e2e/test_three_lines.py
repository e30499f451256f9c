"""Three lines in a user's loop: what they take, what they count, and what comes out in the end."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from e2e import variants
from e2e.harness import Run
from e2e.tiny import NextByte, loss_on_all, seeded

import hetero_async as ha
from hetero_async import looking
from hetero_async.errors import UserError
from hetero_async.tensors.model import ServerModel
from hetero_async.watch.verify import Verdict

# The plainest rule: what a few hundred steps have learned shows at once.
PLAIN = {"rule": "sgd", "outer_learning_rate": 1.0}


def exported(run: Run, model: torch.nn.Module) -> torch.nn.Module:
    """The run's parameters in a fresh model, by way of the file that a user gets."""
    out = run.config.directory / "model.safetensors"
    looking.export(run.config, out)
    ha.load(out, model)
    return model


def replayed(run: Run) -> dict[str, torch.Tensor]:
    """The same parameters, recomputed from the first record on."""
    model = ServerModel()
    for entry in run.entries():
        model.apply(entry)
    return model.state_dict()


def steps_counted(verdict: Verdict) -> dict[str, int]:
    return {worker: member.steps for worker, member in verdict.state.members.items()}


def test_two_workers_train_one_model_to_the_end(tmp_path: Path) -> None:
    with Run(tmp_path / "run", samples=4000, **PLAIN) as run:
        run.start_server()
        run.start_workers(step_seconds=0.002)
        verdict = run.finish()
        assert verdict.samples == verdict.state.ledger.positions == 4000
        assert {worker for worker, _ in verdict.deltas} == set(run.names)
        assert verdict.acknowledged == len(verdict.deltas)
        assert steps_counted(verdict) == {worker: len(run.results(worker)["losses"]) for worker in run.names}
        before, after = loss_on_all(seeded()), loss_on_all(exported(run, NextByte()))
        assert after < before - 3, (before, after)


def test_the_exported_model_is_the_replayed_one_under_the_models_own_names(tmp_path: Path) -> None:
    with Run(tmp_path / "run") as run:
        run.start_server()
        run.start_workers()
        run.finish()
        state_dict, expected = exported(run, NextByte()).state_dict(), replayed(run)
        assert state_dict.keys() == expected.keys() == NextByte().state_dict().keys()
        assert all(torch.equal(state_dict[name], expected[name]) for name in expected)
        in_the_way = tmp_path / "again.safetensors.new"
        in_the_way.mkdir()
        with pytest.raises(UserError, match=r"again\.safetensors: cannot be written: .*[Dd]irectory"):
            looking.export(run.config, tmp_path / "again.safetensors")


def test_tied_frozen_scalar_and_empty_parameters_and_groups_of_them(tmp_path: Path) -> None:
    with Run(tmp_path / "run", **PLAIN) as run:
        run.start_server()
        run.start_workers(variants.train_odd)
        run.finish()
        model, start = exported(run, seeded(variants.Odd)), seeded(variants.Odd)
        assert loss_on_all(model) < loss_on_all(start) - 10
        assert model.output.weight is model.bytes.weight
        assert model.scale.shape == () and not torch.equal(model.scale, start.scale)
        assert model.nothing.shape == (0, 12)
        assert torch.equal(model.frozen.weight, start.frozen.weight)
        assert model.constant.item() == variants.FROZEN
        for worker in run.names:
            assert run.results(worker) == {"is_tied": True, "frozen": start.frozen.weight.tolist()}


def test_a_step_every_two_batches_counts_as_one_step_and_as_two_batches(tmp_path: Path) -> None:
    # An odd number of batches: somebody ends with one that no step has followed yet.
    with Run(tmp_path / "run", samples=8 * 151) as run:
        run.start_server()
        run.start_workers(variants.train_accumulating)
        verdict = run.finish()
        assert verdict.samples == 8 * 151
        assert steps_counted(verdict) == {worker: run.results(worker)["steps"] for worker in run.names}
        assert sum(run.results(worker)["batches"] for worker in run.names) >= 151


@pytest.mark.parametrize("script", [variants.train_scaled, variants.train_self_skipping])
def test_a_step_that_the_scaler_skipped_is_no_step(tmp_path: Path, script: Callable[[], None]) -> None:
    with Run(tmp_path / "run", samples=8 * 150) as run:
        run.start_server()
        run.start_workers(script)
        verdict = run.finish()
        results = {worker: run.results(worker) for worker in run.names}
        assert all(result["skipped"] > 0 for result in results.values())
        assert steps_counted(verdict) == {worker: result["steps"] for worker, result in results.items()}


def test_a_bf16_worker_trains_beside_an_fp32_one(tmp_path: Path) -> None:
    with Run(tmp_path / "run", samples=3200, **PLAIN) as run:
        run.start_server()
        first, second = run.names
        run.start_worker(first, awaited=run.names, dtype="fp32", step_seconds=0.002)
        run.start_worker(second, awaited=run.names, dtype="bf16", step_seconds=0.002)
        run.wait(lambda: run.deltas(first) and run.deltas(second), "both have pushed")
        assert {worker["worker"]: worker["dtype"] for worker in run.status()["workers"]} == {
            first: "fp32",
            second: "bf16",
        }
        run.finish()
        assert [run.results(worker)["device_dtype"] for worker in run.names] == ["torch.float32", "torch.bfloat16"]
        assert loss_on_all(exported(run, NextByte())) < loss_on_all(seeded()) - 3


def test_samples_of_refused_deltas_are_trained_by_somebody_all_the_same(tmp_path: Path) -> None:
    with Run(tmp_path / "run", max_staleness=0) as run:
        run.start_server()
        workers = run.start_workers(step_seconds=0.002)
        assert run.finish().samples == 1600
        assert any("delta refused" in life.said and "too stale: 1 versions behind" in life.said for life in workers)


@pytest.mark.parametrize("merge", ["per-push", "all"])
def test_other_ways_to_merge_finish_too(tmp_path: Path, merge: str) -> None:
    with Run(tmp_path / "run", merge=merge) as run:
        run.start_server()
        run.start_workers()
        assert run.finish().samples == 1600
