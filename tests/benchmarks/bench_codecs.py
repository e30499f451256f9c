"""How many bits a parameter each codec takes on real deltas, beside their entropy, and what it leaves out.

The deltas are those of a byte-level transformer that one worker trains: rounds early and late. The entropy is what a
coder must spend that takes one code at a time: of int8 to 2bit the codes' own, with their scales as they are; of fp32
and bf16 that of each plane of bytes; of topk the choice of 64 among 4096, log₂ of a binomial, with its codes' own.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice

import torch
from benchmarks.figures import Figures, in_turns, on_threads
from rich.console import Console
from rich.table import Table
from tensors.models import values

from hetero_async.formats.compression import compress, decompress
from hetero_async.sim.corpus import standard_library
from hetero_async.sim.plan import WorkerPlan
from hetero_async.sim.text import Reading, Shape
from hetero_async.tensors.codecs import CODECS, decode_payload, encode_payload
from hetero_async.tensors.codecs.codec import nibbles
from hetero_async.tensors.codecs.magnitudes import crumbs
from hetero_async.tensors.codecs.top_k import CHUNK, KEPT

STEPS_PER_ROUND, BATCH = 32, 8
ROUNDS = (2, 10, 40)
PLANES = {"fp32": 4, "bf16": 2}
CODE_BITS = {"int8": 8, "int4": 4, "e3m0": 4, "2bit": 2, "topk": 2}
# zstd looks for repetitions, of which there are none: what it saves is what its entropy coder does.
BITS_OVER_ENTROPY_MAX = 1.15
NUMEL = 16_000_000  # whose speed is measured
COMMON = ("int8", "int4")
ENCODE_COPIES_MAX, DECODE_COPIES_MAX = 5, 3


def test_zstd_comes_close_to_the_entropy_of_real_deltas() -> None:
    deltas = [delta for number, delta in enumerate(islice(rounds(), max(ROUNDS)), 1) if number in ROUNDS]
    table = Table(title=f"{deltas[0].numel():,} parameters, rounds {', '.join(map(str, ROUNDS))}")
    for column in ("codec", "bits laid out", "sent", "entropy", "energy left out"):
        table.add_column(column, justify="left" if column == "codec" else "right")
    for name, codec in CODECS.items():
        sent = [8 * len(encode_payload(name, delta)) / delta.numel() for delta in deltas]
        floor = [entropy(name, delta) for delta in deltas]
        left_out = [energy_left_out(name, delta) for delta in deltas]
        laid_out = 8 * codec.raw_bytes(deltas[0].numel()) / deltas[0].numel()
        table.add_row(name, f"{laid_out:.2f}", *(listed(figures) for figures in (sent, floor)), listed(left_out, 4))
        assert max(s / f for s, f in zip(sent, floor, strict=True)) <= BITS_OVER_ENTROPY_MAX, name
    print()
    Console(width=110).print(table)


def test_codec(figures: Figures) -> None:
    flat, copied = values(NUMEL, seed=0), torch.empty(NUMEL)
    copy = partial(copied.copy_, flat)
    for name, codec in CODECS.items():
        raw, out = codec.encode(flat), torch.empty(NUMEL)
        packed = compress(raw.numpy().data)
        is_common = name in COMMON
        work: dict[str, tuple[Callable[[], object], float | None]] = {
            "encode": (partial(codec.encode, flat), ENCODE_COPIES_MAX if is_common else None),
            "decode": (partial(codec.decode, raw, NUMEL, 0, out), DECODE_COPIES_MAX if is_common else None),
            "zstd of it": (partial(compress, raw.numpy().data), None),
            "zstd back": (partial(decompress, packed, len(raw)), None),
        }
        for what, (does, goal) in work.items():
            with on_threads(1):
                turns = [(own * 1e9 / 4 / NUMEL, floor * 1e9 / 4 / NUMEL) for own, floor in in_turns(does, copy)]
            figures.add(f"codec: {name} {what}, against a copy, one core", turns, "s/GB", at_most=goal)


def rounds() -> Iterator[torch.Tensor]:
    """Their deltas, flat fp32."""
    reading = Reading(Shape(), seed=0, evaluated_windows=1, corpus=standard_library())
    student, samples = reading.student(WorkerPlan(name="w", site="s", step_seconds=1.0), 0), count()
    parameters = list(student.model.parameters())
    while True:
        before = torch.nn.utils.parameters_to_vector(parameters).detach().clone()
        for _ in range(STEPS_PER_ROUND):
            student.progress = min(1.0, student.progress + 1 / (STEPS_PER_ROUND * max(ROUNDS)))
            student.step([sample % reading.samples for sample in islice(samples, BATCH)])
        yield before - torch.nn.utils.parameters_to_vector(parameters).detach()


def entropy(name: str, delta: torch.Tensor) -> float:
    """Bits a parameter."""
    raw, numel = CODECS[name].encode(delta), delta.numel()
    if name in PLANES:
        return sum(entropy_of(plane) for plane in raw.view(PLANES[name], -1))
    bits = CODE_BITS[name]
    if name == "topk":
        chunks = math.ceil(numel / CHUNK)
        places = (math.lgamma(CHUNK + 1) - math.lgamma(KEPT + 1) - math.lgamma(CHUNK - KEPT + 1)) / math.log(2)
        codes = crumbs(raw[-chunks * KEPT * bits // 8 :])
        return chunks * (places + 32 + KEPT * entropy_of(codes)) / numel
    code_bytes = math.ceil(numel / 64) * 64 * bits // 8
    packed, side = raw[-code_bytes:], 8 * (len(raw) - code_bytes) / numel
    codes = {8: lambda: packed, 4: lambda: nibbles(packed) & 15, 2: lambda: crumbs(packed)}[bits]()
    return side + entropy_of(codes)


def entropy_of(symbols: torch.Tensor) -> float:
    """Bits a symbol."""
    shares = torch.bincount(symbols.int()).double() / symbols.numel()
    shares = shares[shares > 0]
    return float(-(shares * shares.log2()).sum())


def energy_left_out(name: str, delta: torch.Tensor) -> float:
    error = decode_payload(name, encode_payload(name, delta), delta.numel()) - delta
    return float((error.norm() / delta.norm()) ** 2)


def listed(figures: list[float], digits: int = 2) -> str:
    return " / ".join(f"{figure:.{digits}f}" for figure in figures)
