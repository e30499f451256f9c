"""A host that rounds otherwise is found out."""

import pytest
import torch

from hetero_async.tensors import outer, selfcheck
from hetero_async.tensors.codecs import CODECS, Codec


def test_this_host_computes_what_every_other_does() -> None:
    assert selfcheck.arithmetic() == selfcheck.DIGEST


def test_a_fused_product_and_sum_is_another_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    def fused(
        theta: torch.Tensor, buffers: list[torch.Tensor], g: torch.Tensor, spare: torch.Tensor, coefficients: object
    ) -> None:
        decay, intake, gain, pull = selfcheck.COEFFICIENTS
        (m,) = buffers
        # What a fused instruction does: one rounding, at the end.
        m.copy_((m.double() * decay + g.double() * intake).float())
        theta.copy_((theta.double() - (g.double() * gain + m.double() * pull)).float())

    monkeypatch.setattr(outer, "step", fused)
    assert selfcheck.arithmetic() != selfcheck.DIGEST


def test_a_codec_that_codes_otherwise_on_a_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert selfcheck.differing_codecs(torch.device("cpu")) == []
    usual, said = CODECS["int8"], []

    class Drifting:
        def encode(self, flat: torch.Tensor) -> torch.Tensor:
            said.append(usual.encode(flat + 1e-3 * len(said)))
            return said[-1]

    drifting: Codec = Drifting()  # type: ignore[assignment]
    monkeypatch.setitem(CODECS, "int8", drifting)
    assert selfcheck.differing_codecs(torch.device("cpu")) == ["int8"]
