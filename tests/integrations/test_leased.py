"""What of a DataLoader a run can lease, and what a wrapped optimizer counts as a step."""

import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from texts import WINDOW, Windows
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler

from hetero_async.errors import DatasetError, HeteroAsyncError, UserError
from hetero_async.inspection import inner_optimizer
from hetero_async.integrations.leased import LeasedLoader


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield 0


def test_dataset_batch_size_and_collate_function_are_the_loaders_prepared_or_not() -> None:
    loader = DataLoader(Windows(), batch_size=8, shuffle=True, collate_fn=len)
    for given in (loader, Accelerator(cpu=True).prepare(loader)):
        leased = LeasedLoader(given)
        assert (leased.dataset, leased.batch_size, leased.collate) == (loader.dataset, 8, len)
    assert Windows()[3]["input_ids"].shape == (WINDOW,)


@pytest.mark.parametrize(
    ("loader", "complaint"),
    [
        (DataLoader(Windows(), batch_size=None), "has no batch_size: the run leases samples by the batch"),
        (DataLoader(Stream(), batch_size=4), "Stream has no numbered samples: a map-style dataset is needed"),
        (
            DataLoader(Windows(), batch_size=4, sampler=WeightedRandomSampler([1.0], 1)),
            "WeightedRandomSampler chooses samples, which the run does here: leave it out",
        ),
    ],
)
def test_what_cannot_be_leased_is_told(loader: DataLoader[Any], complaint: str) -> None:
    with pytest.raises(DatasetError, match=complaint):
        LeasedLoader(loader)


def test_it_is_not_iterated_before_the_run_is_joined() -> None:
    with pytest.raises(UserError, match="iterated before the run was joined"):
        next(iter(LeasedLoader(DataLoader(Windows(), batch_size=8))))


def test_a_step_that_accelerate_leaves_out_is_no_step() -> None:
    """Steps are told of by the optimizer within: while gradients accumulate, and where they overflowed, by none."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = torch.nn.Linear(2, 1)
    scaler = torch.amp.GradScaler("cpu")
    optimizer = AcceleratedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), scaler=scaler)
    steps: list[int] = []
    inner_optimizer(optimizer).register_step_post_hook(lambda *_: steps.append(batch))
    for batch in range(8):
        with accelerator.accumulate(model):
            loss = model(torch.ones(1, 2)).sum() * (float("inf") if batch == 4 else 1.0)
            scaler.scale(loss).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert steps == [1, 3, 7]


@pytest.mark.parametrize(
    ("integration", "package"),
    [("accelerate", "accelerate"), ("huggingface", "transformers"), ("lightning", "lightning")],
)
def test_without_its_extra_an_integration_names_it(
    monkeypatch: pytest.MonkeyPatch, integration: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"hetero_async.integrations.{integration}", raising=False)
    with pytest.raises(HeteroAsyncError, match=rf"needs {package}: pip install 'hetero-async\[{integration}\]'"):
        import_module(f"hetero_async.integrations.{integration}")
