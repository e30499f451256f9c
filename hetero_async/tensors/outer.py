"""The outer step on a block of the parameters: core/outer.py has decided on its coefficients.

Elementwise, in place, and each product is rounded before it is added: fused forms (`add_(alpha=)`, `lerp_`, `addcmul_`)
round differently on different CPUs, and the log would not give the same bits everywhere.
"""

import torch

# Vectors of the size of θ that a rule keeps beside it; every other one keeps a momentum.
BUFFERS = {"sgd": 0}


def buffers_of(rule: str) -> int:
    return BUFFERS.get(rule, 1)


def step(
    theta: torch.Tensor,
    buffers: list[torch.Tensor],
    g: torch.Tensor,
    spare: torch.Tensor,
    coefficients: tuple[float, float, float, float],
) -> None:
    """Move a block of θ and of its momentum m, if it has one: m ← decay·m + intake·g; θ ← θ − (gain·g + pull·m).

    `coefficients`: decay, intake, gain, pull. `g` and `spare` are used up. All fp32, all of one length.
    """
    decay, intake, gain, pull = coefficients
    for m in buffers:
        torch.mul(g, intake, out=spare)
        m.mul_(decay).add_(spare)
    g.mul_(gain)
    for m in buffers:
        torch.mul(m, pull, out=spare)
        g.add_(spare)
    theta.sub_(g)
