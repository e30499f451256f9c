"""What layers answer, in figures: the same however a CPU does it, and other arithmetic is told from mere rounding."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hetero_async.core.probe import BATCH, FIGURES, LAYERS_MAX, NAME_LENGTH_MAX, PROJECTIONS, TOLERANCES, Digest
from hetero_async.core.probing import _first_difference, distance
from hetero_async.tensors import digest
from hetero_async.tensors.digest import figures_of, hash_of_input, inputs_of, of_batch, of_layers, seeded

CPU = torch.device("cpu")
MANY = 1_000


class Block(nn.Module):
    def __init__(self, width: int, act: type[nn.Module] = nn.GELU, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.up, self.act, self.down = nn.Linear(width, 4 * width), act(), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        normal = self.norm(x)
        x = x + self.attention(normal, normal, normal, need_weights=False)[0]
        return x + self.down(self.act(self.up(x)))


class Transformer(nn.Module):
    def __init__(self, depth: int = 6, width: int = 64, blocks: Callable[[int, int], nn.Module] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.ModuleList((blocks or (lambda _, width: Block(width)))(place, width) for place in range(depth))
        self.head = nn.Linear(width, 256, bias=False)
        self.head.weight = self.embedding.weight  # tied

    def forward(self, numbers: Tensor) -> Tensor:
        x = self.embedding(numbers)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class ConvolutionNet(nn.Module):
    """With buffers, of which the statistics are not those that it begins with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, groups=4),
            nn.GroupNorm(8, 64), nn.SiLU(), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(10), nn.Softmax(dim=-1),
        )  # fmt: skip
        self.layers(torch.rand(4, 3, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


WORDS = torch.arange(64).reshape(2, 32) * 3 % 256
PICTURES = seeded(4, 3, 16, 16)
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "transformer": (Transformer, WORDS),
    "convolutions": (ConvolutionNet, PICTURES),
}


@torch.no_grad()
def probed(model: nn.Module, batch: Any = None, dtype: torch.dtype = torch.float32) -> Digest:
    model = model.eval().to(dtype)
    return (
        of_layers(model, CPU, dtype, lambda layer, given: layer(*given))
        if batch is None
        else of_batch(model, batch, CPU, dtype)
    )


def worst(one: Digest, other: Digest) -> float:
    """The largest distance of a layer's outputs, where errors of a whole model's layers are taken to add up."""
    found = other.outputs()
    return max(
        distance(figures, found[layer]) / (math.sqrt(1 + place) if one.kind == BATCH else 1)
        for place, (layer, figures) in enumerate(one.outputs().items())
    )


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_one_thread_and_four_come_to_the_same(name: str, whole: bool) -> None:
    make, batch = MODELS[name]
    model = make()
    outcomes = []
    for count in (1, 4):
        with threads(count):
            outcomes.append(probed(model, batch if whole else None))
    assert outcomes[0].layers == outcomes[1].layers
    assert worst(*outcomes) < TOLERANCES["fp32"] / 30


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_coarser_dtype_is_within_its_tolerance_and_far_beyond_fp32s(
    dtype: torch.dtype, name: str, whole: bool
) -> None:
    make, batch = MODELS[name]
    given = batch if whole else None
    fine, coarse = probed(make(), given), probed(make(), given, dtype)
    assert (fine.arithmetic, coarse.arithmetic) == ("fp32", "bf16" if dtype == torch.bfloat16 else "fp16")
    assert not _first_difference(fine, coarse)
    assert not _first_difference(coarse, fine)
    assert TOLERANCES["fp32"] < worst(fine, coarse) < TOLERANCES[coarse.arithmetic] / 2


def as_tf32(model: nn.Module) -> nn.Module:
    """Its products have operands of ten bits behind the point, as TF32's do."""

    def rounded(value: Tensor) -> Tensor:
        bits = value.contiguous().view(torch.int32)
        return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)

    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.weight = nn.Parameter(rounded(layer.weight.detach()))
            layer.register_forward_pre_hook(lambda _, inputs: tuple(map(rounded, inputs)))
    return model


@pytest.mark.parametrize("whole", [True, False])
def test_products_as_tf32_does_them_are_beyond_fp32s_tolerance_and_within_its_own(whole: bool) -> None:
    given = PICTURES if whole else None
    exact, coarse = probed(ConvolutionNet(), given), probed(as_tf32(ConvolutionNet()), given)
    assert "is the first layer that differs" in _first_difference(exact, coarse)
    object.__setattr__(coarse, "arithmetic", "tf32")
    assert not _first_difference(exact, coarse)
    assert not _first_difference(coarse, exact)


def other_epsilon(place: int, width: int) -> Block:
    return Block(width, eps=1e-3 if place == 2 else 1e-5)


def other_activation(place: int, width: int) -> Block:
    return Block(width, nn.SiLU if place == 4 else nn.GELU)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("blocks", "layer", "dtype"), [
    (other_epsilon, "blocks.2.norm", torch.float32),
    (other_activation, "blocks.4.act", torch.float32),
    (other_activation, "blocks.4.act", torch.bfloat16),
])  # fmt: skip
def test_a_layer_that_does_something_else_is_named(
    blocks: Callable[[int, int], nn.Module], layer: str, dtype: torch.dtype, whole: bool
) -> None:
    given = WORDS if whole else None
    usual, other = probed(Transformer(), given), probed(Transformer(blocks=blocks), given, dtype)
    assert f"{layer} is the first layer that differs" in _first_difference(usual, other)


def test_the_approximation_of_an_activation_is_told_where_the_arithmetic_is_fine_enough() -> None:
    approximate = probed(nn.Sequential(nn.GELU(approximate="tanh")))
    assert "0 is the first layer" in _first_difference(probed(nn.Sequential(nn.GELU())), approximate)


def test_a_layer_that_runs_twice_and_what_comes_out_in_the_end_have_names() -> None:
    layer = nn.Linear(4, 4)
    assert probed(nn.Sequential(layer, nn.ReLU(), layer), seeded(2, 4)).layers == ("0", "1", "0#2", "(output)")
    shared = nn.Sequential(layer, nn.ReLU())
    assert probed(shared).layers == ("0", "1")


def test_of_a_deep_model_layers_are_chosen_evenly_and_the_last_is_among_them() -> None:
    outcome = probed(nn.Sequential(*(nn.ReLU() for _ in range(MANY))), seeded(2, 4))
    assert (len(outcome.layers), outcome.executed, outcome.layers[-1]) == (LAYERS_MAX, MANY + 1, "(output)")
    assert outcome.is_sound
    long = nn.Sequential()
    long.add_module("é" + "x" * 200, nn.ReLU())
    assert [len(name) for name in probed(long).layers] == [NAME_LENGTH_MAX]


@pytest.mark.parametrize("given", [
    WORDS, (WORDS,), {"numbers": WORDS},
], ids=["tensor", "tuple", "dict"])  # fmt: skip
def test_a_batch_is_a_tensor_or_arguments(given: Any) -> None:
    assert probed(Transformer(), given) == probed(Transformer(), WORDS)


def test_the_hash_of_a_batch_is_of_its_values_whatever_their_dtype() -> None:
    assert hash_of_input({"x": PICTURES.half(), "y": [WORDS.int()]}) == hash_of_input({"x": PICTURES, "y": (WORDS,)})
    assert hash_of_input(PICTURES) != hash_of_input(PICTURES + 1 / 64)
    assert hash_of_input(PICTURES) != hash_of_input(PICTURES.flatten())


LAYERS_OF_TORCH = [
    nn.Linear(5, 3), nn.Bilinear(3, 4, 5), nn.Embedding(7, 3), nn.EmbeddingBag(7, 3), nn.Conv1d(2, 4, 3),
    nn.Conv2d(4, 4, (1, 5), dilation=3, groups=2), nn.Conv3d(2, 4, 3), nn.ConvTranspose2d(3, 4, 4, stride=2),
    nn.LayerNorm((3, 4)), nn.RMSNorm(6), nn.GroupNorm(2, 6), nn.BatchNorm1d(3), nn.BatchNorm3d(3), nn.InstanceNorm1d(3),
    nn.InstanceNorm2d(3), nn.LSTM(4, 5), nn.GRU(4, 5, batch_first=True), nn.PReLU(3), nn.MultiheadAttention(8, 2),
    nn.GELU(), nn.GLU(), nn.Softmax(dim=-1), nn.Hardtanh(),
]  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS_OF_TORCH, ids=lambda layer: type(layer).__name__)
def test_layers_of_torch_take_the_inputs_that_they_are_given(layer: nn.Module) -> None:
    outcome = probed(layer)
    assert "(output)" in outcome.layers
    assert outcome.outputs()["(output)"][0] > 0


def test_layers_of_others_and_those_that_do_not_take_their_input_are_passed_over() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("its input is not known")

    assert inputs_of(Own()) is None
    assert probed(nn.Sequential(Own(), nn.Softmax2d(), nn.ReLU())).layers == ("2",)


def test_inputs_are_the_same_everywhere_and_exact_in_every_dtype() -> None:
    assert seeded(2, 2).tolist() == [[0.921875, 1.9375], [-1.046875, 1.953125]]
    many = seeded(100_000)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(many.to(dtype).float(), many)
    assert abs(float(many.mean())) < 0.02
    assert float(many.std()) == pytest.approx(2 / math.sqrt(3), rel=0.01)


def test_figures_tell_how_far_two_outputs_are_apart_whatever_the_difference_is() -> None:
    torch.manual_seed(0)
    ratios = []
    for trial in range(200):
        y = torch.randn(1000) * (1 + trial)
        d = [torch.randn(1000), torch.ones(1000), torch.eye(1000)[trial] * 30][trial % 3]
        d = 0.01 * d / d.norm() * y.norm()
        ratios.append(distance(figures_of(y), figures_of(y + d)) / 0.01)
    assert math.sqrt(sum(ratio**2 for ratio in ratios) / len(ratios)) == pytest.approx(1, abs=0.3)
    assert min(ratios) > 0.05
    assert max(ratios) < 3


def test_of_many_values_some_are_taken_and_what_is_not_finite_counts_as_nothing() -> None:
    large = torch.linspace(-1, 1, 3_000_001)
    assert figures_of(large)[0] == pytest.approx(1 / math.sqrt(3), rel=1e-3)
    assert len(figures_of(large)) == FIGURES == 1 + PROJECTIONS
    spoilt = torch.tensor([3.0, math.nan, math.inf, 4.0])
    assert figures_of(spoilt)[0] == pytest.approx(2.5)
    assert figures_of({"a": [spoilt], "b": torch.tensor([1])}) == figures_of((spoilt,))
    assert figures_of(torch.tensor([3 + 4j]))[0] == pytest.approx(5 / math.sqrt(2))
    assert not figures_of(torch.tensor([1]))
    assert not figures_of([None, torch.empty(0)])


def test_the_arithmetic_is_found_by_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, convolving = nn.Linear(2, 2), nn.Conv2d(1, 1, 1)
    assert digest.arithmetic_of(convolving, CPU, torch.float32) == "fp32"
    assert digest.arithmetic_of(plain, CPU, torch.float64) == "fp32"

    def coarse(bits: int, trial: Callable[[float, torch.device], Tensor]) -> Callable[[float, torch.device], Tensor]:
        return lambda value, device: trial(round(value * 2**bits) / 2**bits, device)

    monkeypatch.setattr(digest, "_convolved", coarse(10, digest._convolved))
    assert digest.arithmetic_of(convolving, CPU, torch.float32) == "tf32"
    assert digest.arithmetic_of(plain, CPU, torch.float32) == "fp32", "it has no convolution"
    monkeypatch.setattr(digest, "_product", coarse(7, digest._product))
    assert digest.arithmetic_of(plain, CPU, torch.float32) == "bf16"
