"""The examples that need no framework, or a light one, train one model with two workers, to the end."""

from pathlib import Path

import pytest
import torch
from e2e.harness import Run
from integrations import scripts
from lora import adapted_model
from safetensors.torch import load_file
from texts import Windows

import hetero_async as ha
from hetero_async import looking
from hetero_async.core.ledger import SHARED
from hetero_async.core.records import Genesis, Metric
from hetero_async.tensors.codecs import encode_payload
from hetero_async.tensors.model import PAYLOAD_SLACK_BYTES

EXAMPLES = Path(scripts.__file__).parents[2] / "examples"
RUN_BY = sorted({"plain_loop", "accelerate_loop", "huggingface_trainer", "lightning_module", "lora"})


@pytest.mark.parametrize("example", RUN_BY)
def test_an_example_begins_with_the_command_that_runs_it(example: str) -> None:
    first = (EXAMPLES / f"{example}.py").read_text().splitlines()[0]
    assert first == f'"""make run-example EXAMPLE={example}'
    assert example in (EXAMPLES.parent / "Makefile").read_text()


@pytest.mark.parametrize(("example", "samples_a_step"), [("plain_loop", 16), ("accelerate_loop", 2 * 8)])
def test_two_workers_of_a_loop_train_each_sample_once(tmp_path: Path, example: str, samples_a_step: int) -> None:
    with Run(tmp_path / "run", samples=2400) as run:
        run.start_server()
        run.start_workers(scripts.run, example=example)
        verdict = run.finish()
        assert {worker for worker, _ in verdict.deltas} == set(run.names)
        assert verdict.samples == 2400 and verdict.samples_twice == 0
        assert verdict.state.ledger.books[SHARED].samples == len(Windows())
        # Half an accumulated step at the run's end is made whole with samples that had no step yet, or goes without.
        steps = sum(member.steps for member in verdict.state.members.values())
        assert abs(steps - 2400 / samples_a_step) <= 2 * len(run.names)


def test_of_a_frozen_model_with_adapters_only_the_adapters_travel(tmp_path: Path) -> None:
    fresh = adapted_model()
    adapters = {name: each for name, each in fresh.named_parameters() if each.requires_grad}
    numel = sum(each.numel() for each in adapters.values())
    frozen = sum(each.numel() for each in fresh.parameters()) - numel
    assert frozen > 10 * numel
    with Run(tmp_path / "run", samples=1600) as run:
        run.start_server()
        run.start_workers(scripts.run, example="lora")
        verdict = run.finish()
        assert {worker for worker, _ in verdict.deltas} == set(run.names)
        sizes = {len(entry.payload) for entry in run.entries() if type(entry.record).__name__ == "Delta"}
        largest = len(encode_payload("int8", torch.randn(numel)))
        assert max(sizes) < 1.1 * largest
        initial = next(len(entry.payload) for entry in run.entries() if isinstance(entry.record, Genesis))
        assert initial < 4 * numel + PAYLOAD_SLACK_BYTES < 4 * frozen
        assert {run.results(worker)["frozen"] for worker in run.names} == {scripts.frozen_hash(fresh)}
        assert {metric.name for metric in run.records(Metric)} == {"loss"}

        out = tmp_path / "adapters.safetensors"
        looking.export(run.config, out)
        exported = load_file(out)
        assert exported.keys() == adapters.keys()
        assert not torch.equal(exported["blocks.0.widen.lora_b"], adapters["blocks.0.widen.lora_b"])
        ha.load(out, fresh)
        assert all(torch.equal(each, exported[name]) for name, each in adapters.items())
        assert {run.results(worker)["frozen"] for worker in run.names} == {scripts.frozen_hash(fresh)}
