"""Hugging Face: a Trainer that trains leased samples, and a run's export that transformers loads to the bit."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e.harness import Run, forked
from integrations import scripts
from tiny_gpt2 import tiny_gpt2
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hetero_async import looking
from hetero_async.config import ENV_RUN, ENV_WORKER
from hetero_async.core.records import Metric
from hetero_async.errors import UserError
from hetero_async.integrations.huggingface import attach


def test_two_trainers_train_one_model_and_transformers_loads_its_export(tmp_path: Path) -> None:
    with Run(tmp_path / "run", samples=1600) as run:
        run.start_server()
        run.start_workers(scripts.run, example="huggingface_trainer", output_dir=str(tmp_path / "out"))
        verdict = run.finish()
        assert {worker for worker, _ in verdict.deltas} == set(run.names)
        assert verdict.samples == 1600 and verdict.samples_twice == 0
        results = {worker: run.results(worker) for worker in run.names}
        steps = {worker: member.steps for worker, member in verdict.state.members.items()}
        assert steps == {worker: result["steps"] for worker, result in results.items()}
        for worker, result in results.items():
            assert result["steps_of_run"] == 1600 / (8 * 2) == 100
            by_own_steps = 1e-2 * (1 + math.cos(math.pi * (result["steps"] - 5) / (100 - 5))) / 2
            assert result["learning_rate"] < by_own_steps, "the other one's steps count as well"
            assert result["output_dir"] == str(tmp_path / "out" / worker)
        assert {metric.name for metric in run.records(Metric)} == {"eval_loss"}

        like, out = tmp_path / "like", tmp_path / "exported"
        tiny_gpt2().config.save_pretrained(like)
        (like / "tokenizer_config.json").write_text("{}")
        told = forked(
            tmp_path, "export", out, "--run", run.config.path, "--format", "huggingface", "--like", like,
            "--shard-size", "40KB",
        )  # fmt: skip
        assert told.exit_code == 0, told.errors
        check_export(run, out)


def check_export(run: Run, out: Path) -> None:
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert "lm_head.weight" not in index["weight_map"], "of tied parameters one is kept, as transformers does"
    assert (out / "tokenizer_config.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(out)
    _, model = looking._newest(run.config)
    expected = model.state_dict()
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == torch.float32 for name in expected)
    assert not torch.equal(found["lm_head.weight"], tiny_gpt2().lm_head.weight)


@pytest.fixture
def a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The environment that `work` gives a script; nobody serves."""
    run = Run(tmp_path / "run")
    monkeypatch.setenv(ENV_RUN, str(run.config.path))
    monkeypatch.setenv(ENV_WORKER, run.names[0])
    return run


@pytest.mark.usefixtures("a_worker")
def test_the_trainer_never_stops_at_a_number_of_steps(tmp_path: Path) -> None:
    """A worker that does them all would stop before its last round is pushed."""
    arguments = TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = Trainer(model=tiny_gpt2(), args=arguments)
    attach(trainer)
    state, control = trainer.state, trainer.control
    state.max_steps, state.global_step = 10, 9
    trainer.callback_handler.on_step_begin(arguments, state, control)
    state.global_step += 1
    trainer.callback_handler.on_step_end(arguments, state, control)
    assert not control.should_training_stop


@pytest.mark.usefixtures("a_worker")
@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"max_steps": 10}, r"max_steps = 10: how long a run is stands in run\.toml"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size begins training anew: give a batch size instead"),
    ],
)
def test_settings_that_do_not_go_with_a_run_are_refused(
    tmp_path: Path, settings: dict[str, Any], complaint: str
) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none", **settings)
    with pytest.raises(UserError, match=complaint):
        attach(Trainer(model=tiny_gpt2(), args=arguments))
