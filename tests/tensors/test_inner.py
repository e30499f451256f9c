"""An optimizer that gets its state back goes on as if it had never been away."""

from collections.abc import Callable

import pytest
import torch
from tensors.models import values

from hetero_async.errors import PeerError
from hetero_async.tensors import inner

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
MAKERS: dict[str, Make] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "fused adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.1),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.1),
}


def fresh(make: Make) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    parameters = [torch.nn.Parameter(values(12, seed=1).view(3, 4)), torch.nn.Parameter(values(4, seed=2))]
    return parameters, make(parameters)


def step(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, seed: int) -> None:
    for parameter in parameters:
        parameter.grad = values(parameter.numel(), seed=seed).view(parameter.shape)
    optimizer.step()


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_a_restored_optimizer_takes_the_same_steps(name: str) -> None:
    parameters, optimizer = fresh(MAKERS[name])
    for seed in range(3):
        step(parameters, optimizer, seed)
    content = inner.to_bytes(inner.packed(optimizer))
    again, restored = fresh(MAKERS[name])
    with torch.no_grad():
        for ours, theirs in zip(again, parameters, strict=True):
            ours.copy_(theirs)
    inner.restore(restored, content)
    for seed in range(3, 6):
        step(parameters, optimizer, seed)
        step(again, restored, seed)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, parameters, strict=True))


def test_the_copy_is_of_that_moment() -> None:
    parameters, optimizer = fresh(MAKERS["sgd"])
    step(parameters, optimizer, 0)
    tensors = inner.packed(optimizer)
    before = tensors["0/momentum_buffer"].clone()
    step(parameters, optimizer, 1)
    assert torch.equal(tensors["0/momentum_buffer"], before)


def test_an_optimizer_that_has_not_stepped_has_nothing_to_keep() -> None:
    assert inner.packed(fresh(MAKERS["adamw"])[1]) == {}


def test_a_state_that_is_no_tensor_is_not_kept() -> None:
    parameters, optimizer = fresh(MAKERS["sgd"])
    step(parameters, optimizer, 0)
    optimizer.state[parameters[0]]["history"] = [1, 2]
    assert inner.packed(optimizer) == {}


def kept(name: str) -> bytes:
    parameters, optimizer = fresh(MAKERS[name])
    step(parameters, optimizer, 0)
    return inner.to_bytes(inner.packed(optimizer))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (kept("adamw"), "it is of AdamW, and the optimizer is SGD"),
        (b"something else", "not an optimizer's state"),
        (inner.to_bytes({"0/x": torch.zeros(1)}), "it is of nothing known, and the optimizer is SGD"),
        (inner.to_bytes({"about": torch.zeros(3, dtype=torch.uint8)}), "not an optimizer's state"),
    ],
)
def test_what_is_not_this_optimizers_is_refused(content: bytes, complaint: str) -> None:
    _, optimizer = fresh(MAKERS["sgd"])
    with pytest.raises(PeerError, match=complaint):
        inner.restore(optimizer, content)
    assert not optimizer.state


@pytest.mark.parametrize(
    ("shapes", "complaint"),
    [
        ([(3, 4)], "it has a state of parameter 1, and the optimizer has 1 parameters"),
        ([(3, 4), (5,)], r"its momentum_buffer of parameter 1 is \(4,\), and the parameter is \(5,\)"),
    ],
)
def test_a_changed_model_is_told(shapes: list[tuple[int, ...]], complaint: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(shape)) for shape in shapes], lr=0.1, momentum=0.9)
    with pytest.raises(PeerError, match=complaint):
        inner.restore(optimizer, kept("sgd"))
    assert not optimizer.state
