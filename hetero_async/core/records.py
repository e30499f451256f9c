"""The log's records: every change of the run's state, as plain values.

The server makes them, `State.fold` and the model apply them, the log keeps them, verify reads them. A record
holds decisions (weights, accepted or not, who left), never questions, so that applying it needs no clock and no
luck. What is too big for a header (an encoded delta, the initial parameters) rides beside it as `Entry.payload`.
"""

from dataclasses import dataclass, replace

from hetero_async.core.probe import Digest

# A half-open stretch [start, stop) of run positions. Position p is sample permute(p % samples) of pass p // samples.
Range = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What the run was told to do. Fixed in `Genesis`; the part that may change while running changes by `Settings`."""

    run: str
    seed: int = 0
    # The goal: exactly one of the two is non-zero. `samples` counts every sample of every pass.
    samples: int = 0
    passes: float = 0.0
    merge: str = "window"  # window | per-push | all
    rule: str = "auto"  # one of outer.py's
    outer_learning_rate: float = 0.7
    momentum: float = 0.9
    weights: str = "workers"  # workers | tokens
    staleness_exponent: float = 0.0  # 0: old deltas weigh what new ones do
    warm_up_rounds: int = 1  # of whoever joins a run under way: its first deltas weigh less
    quorum: int = 1  # so many workers make a merge; fewer wait for the next window
    steps_per_round: int = 32  # H of the fastest worker
    dylu: bool = True  # a slower worker's H follows its speed; false: all have the same
    seconds_per_round: float = 0.0  # when not zero, a window's length; H follows from it
    grace: float = 0.25  # how long a merge waits after its deadline, as a share of the window
    max_staleness: int = 4  # rounds
    norm_gate: float = 20.0  # times the running median; 0 switches it off
    codec_up: str = "int8"
    codec_down: str = "int8"
    publish_every: int = 1  # outer steps
    lease_ttl_seconds: float = 15.0
    probe: str = "warn"  # warn | refuse | off: what becomes of a worker that computes something else


def changed_for_good(logged: RunSettings, wanted: RunSettings) -> list[str]:
    """Names of settings that differ although a run keeps them from its genesis on."""
    fixed = ("run", "seed", "samples", "passes", "rule")
    return [name for name in fixed if replace(logged, **{name: getattr(wanted, name)}) != logged]


@dataclass(frozen=True, slots=True, kw_only=True)
class Genesis:
    """The run begins. Payload: the schema and the initial parameters (`formats.snapshot`), which came from `key`."""

    key: str
    settings: RunSettings
    schema_hash: bytes
    parameters_hash: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """The first worker with such a dataset said how many samples one pass has: a book of the ledger is opened.

    `positions` are the run's, the same for every book.
    """

    samples: int
    positions: int
    book: str = "shared"


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A worker began a life. It keeps `kept` of the ranges it had leased; the rest return to the pool.

    `key` (Z85) proved who it is, and stands for every delta of this life: another key is another life. `is_warm`: its
    inner optimizer has a past, and its deltas count in full from the first on.
    """

    worker: str
    key: str
    site: str
    incarnation: int
    kept: tuple[Range, ...]
    is_warm: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """A worker said bye or its lease ran out; all its ranges return to the pool."""

    worker: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Leased:
    """Positions handed to one worker, nobody else may train on them until it reports or leaves."""

    worker: str
    ranges: tuple[Range, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """An admitted delta and the positions it consumed, durable together. Payload: the encoded delta."""

    worker: str
    incarnation: int
    seq: int
    anchor_version: int
    steps: int
    ranges: tuple[Range, ...]
    codec: str
    norm: float
    payload_hash: bytes
    tokens: int = 0  # trained on, where the worker counts them


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """One outer step: the deltas (by lsn) it merges, each with its weight, and the step's coefficients (outer.py)."""

    version: int
    deltas: tuple[int, ...]
    weights: tuple[float, ...]
    gain: float
    decay: float = 0.0
    intake: float = 0.0
    pull: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """The shadow moves to publish `number`. `merged`: per worker, up to which seq its deltas are in it."""

    number: int
    version: int
    codec: str
    merged: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Beacon:
    """What state and model hashed to just before this record: replay must find the same or halt."""

    version: int
    publish: int
    model_hash: bytes
    state_hash: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A figure that a worker measured (a validation loss), at the version it measured it on."""

    worker: str
    name: str
    value: float
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One worker is to measure the newest publish, as its script's `session.evaluate` says how."""

    worker: str
    publish: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """It has; the figures are in the `Metric` records before. `name`: the one by which that publish is the best yet."""

    worker: str
    publish: int
    name: str = ""
    value: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """A worker's probe came to that, and is a reference for those of later workers."""

    worker: str
    site: str
    device: str
    dtype: str
    software: str
    digest: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Promoted:
    """A standby took over: from here on `server` reigns, in `term`."""

    term: int
    server: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The operator changed settings between two starts of the server."""

    settings: RunSettings


Record = (
    Genesis | Dataset | Joined | Left | Leased | Delta | Stepped | Published | Beacon | Metric | Evaluation | Evaluated
    | Probed | Promoted | Settings
)  # fmt: skip
RECORD_TYPES: tuple[type, ...] = (
    Genesis, Dataset, Joined, Left, Leased, Delta, Stepped, Published, Beacon, Metric, Evaluation, Evaluated,
    Probed, Promoted, Settings,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A record in its place in the log. The payload is opaque here."""

    lsn: int
    term: int
    record: Record
    payload: bytes = b""
