"""Outer rules: how a merged delta g moves the parameters θ.

Each is elementwise, works in place on blocks, and multiplies before it adds: fused forms (`add_(alpha=)`, `lerp_`,
`addcmul_`) round differently on different CPUs, and the log would not give the same bits everywhere. `gain` is the
outer learning rate η, a decision of the `Stepped` record; μ is the run's momentum.
"""

from typing import Protocol

import torch


class OuterRule(Protocol):
    name: str
    buffers: int  # vectors of the size of θ kept beside it

    def step(
        self,
        theta: torch.Tensor,
        buffers: list[torch.Tensor],
        g: torch.Tensor,
        spare: torch.Tensor,
        gain: float,
        mu: float,
    ) -> None:
        """Move a block of θ and its buffers; `g` and `spare` are used up. All fp32, all of one length."""
        ...


class Sgd:
    """θ ← θ − ηg. For codecs whose error feedback is the momentum already. 4 bytes a parameter."""

    name = "sgd"
    buffers = 0

    def step(
        self,
        theta: torch.Tensor,
        buffers: list[torch.Tensor],
        g: torch.Tensor,
        spare: torch.Tensor,
        gain: float,
        mu: float,
    ) -> None:
        theta.sub_(g.mul_(gain))


class Nesterov:
    """m ← μm + g; θ ← θ − η(g + μm). DiLoCo's outer optimizer (Douillard et al. 2023, arXiv 2311.08105), the same as
    torch.optim.SGD(nesterov=True): a constant g moves θ by η/(1−μ) in the long run. 8 bytes a parameter."""

    name = "nesterov"
    buffers = 1

    def step(
        self,
        theta: torch.Tensor,
        buffers: list[torch.Tensor],
        g: torch.Tensor,
        spare: torch.Tensor,
        gain: float,
        mu: float,
    ) -> None:
        (m,) = buffers
        m.mul_(mu).add_(g)
        torch.mul(m, mu, out=spare)
        theta.sub_(g.add_(spare).mul_(gain))


class Lookahead:
    """m ← μm + (1−μ)g; θ ← θ − η(g + μm). Momentum look-ahead, with an averaged momentum (Ajanthan et al. 2025): a
    constant g moves θ by η(1+μ) in the long run, so η need not shrink with small steps. 8 bytes a parameter."""

    name = "lookahead"
    buffers = 1

    def step(
        self,
        theta: torch.Tensor,
        buffers: list[torch.Tensor],
        g: torch.Tensor,
        spare: torch.Tensor,
        gain: float,
        mu: float,
    ) -> None:
        (m,) = buffers
        torch.mul(g, 1.0 - mu, out=spare)
        m.mul_(mu).add_(spare)
        torch.mul(m, mu, out=spare)
        theta.sub_(g.add_(spare).mul_(gain))


RULES: dict[str, OuterRule] = {rule.name: rule for rule in (Nesterov(), Lookahead(), Sgd())}
