"""What a worker's probe came to, as plain values: how the layers of its model answer to an input that is the same for
all workers, on the parameters that the run began with. messages.py has what is said of it, probing.py compares.
"""

import json
from dataclasses import asdict, dataclass, field

BATCH, LAYERS = KINDS = ("batch", "layers")
# Of each layer's output: its root mean square, then so many projections of it (tensors/digest.py).
PROJECTIONS = 4
FIGURES = 1 + PROJECTIONS
# So many layers with such names fit into a header; of a deeper model they are chosen evenly.
LAYERS_MAX = 512
NAME_LENGTH_MAX = 72
# How far a layer's outputs may be apart, relative to their size, by the arithmetic of its products. Where operands are
# rounded to p bits, outputs are off by less than 2^-p of their size; that is seen as four times as much once in 10^12
# times (χ² of PROJECTIONS). With fp32 rounding counts for less than the order in which thousands of terms are added and
# a device's own exp and tanh.
TOLERANCES = {"fp32": 2.0**-13, "tf32": 2.0**-9, "fp16": 2.0**-9, "bf16": 2.0**-6}


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """`layers` in the order in which they ran, of `executed`; `figures`: FIGURES of each. `kind`: of what was put in,
    a batch through the model or an input for each layer, and `input` its hash."""

    kind: str
    input: str
    arithmetic: str  # one of TOLERANCES
    executed: int
    layers: tuple[str, ...] = field(repr=False)
    figures: tuple[float, ...] = field(repr=False)  # not for a line of a log

    @property
    def key(self) -> str:
        """There is one reference of each."""
        return f"{self.kind}/{self.arithmetic}"

    @property
    def is_sound(self) -> bool:
        """Whether it is what a worker's probe gives; a worker says what it likes."""
        return (
            self.kind in KINDS
            and self.arithmetic in TOLERANCES
            and 0 < len(self.layers) <= min(LAYERS_MAX, self.executed)
            and len(self.figures) == FIGURES * len(self.layers)
        )

    def outputs(self) -> dict[str, tuple[float, ...]]:
        return {layer: self.figures[FIGURES * place : FIGURES * (place + 1)] for place, layer in enumerate(self.layers)}


NOTHING = Digest(kind=LAYERS, input="", arithmetic="fp32", executed=0, layers=(), figures=())


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """Worker → server: said after joining until it is answered. `reason`: why there is no digest, "": there is one."""

    incarnation: int
    software: str  # that computed it
    digest: Digest
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeVerdict:
    """Server → worker. `reason` says what differs from the run's reference, "": nothing."""

    reason: str
    is_refused: bool = False


@dataclass(slots=True)
class Reference:
    """Whose outputs those of later workers are compared with. `digest` as JSON: one value for the state's own digest,
    not thousands."""

    worker: str
    site: str
    device: str
    dtype: str
    software: str
    digest: str

    @property
    def whose(self) -> str:
        return described(self.worker, self.site, self.device, self.dtype, self.software)

    @property
    def outcome(self) -> Digest:
        values = json.loads(self.digest)
        return Digest(**values | {"layers": tuple(values["layers"]), "figures": tuple(values["figures"])})


def described(worker: str, site: str, device: str, dtype: str, software: str) -> str:
    return f"{worker} (site {site}, {device}, {dtype}, {software})"


def packed(digest: Digest) -> str:
    return json.dumps(asdict(digest), separators=(",", ":"))
