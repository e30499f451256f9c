"""What a simulated world consists of and what goes wrong in it, and when: plain values, all drawn from one seed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from random import Random

from hetero_async.core.ledger import PRIVATE, SHARED, STREAM
from hetero_async.core.records import RunSettings
from hetero_async.core.replication import Durability
from hetero_async.errors import UserError
from hetero_async.sim.network import Condition

SERVER, WITNESS = "server", "etcd"  # names, and sites of their own
# What can go wrong, with how often it is drawn, and how long it lasts, from … to, in seconds.
FAULTS: dict[str, tuple[float, float, float]] = {
    "kill worker": (3, 0.2, 12),  # seconds: until it is started again
    "kill server": (3, 0.2, 8),
    "cut server's power": (3, 0.2, 8),
    "cut worker's power": (1, 0.2, 8),
    "leave": (1, 0.2, 8),
    "freeze worker": (2, 0.5, 15),
    "freeze server": (1, 0.5, 15),
    "lose site": (1, 2, 15),
    "cut link": (2, 0.5, 12),
    "cut one way": (2, 0.5, 12),
    "flapping link": (1, 4, 12),
    "reset connections": (2, 0, 0),
    "lose messages": (2, 1, 10),
    "double messages": (1, 1, 10),
    "reorder messages": (2, 1, 10),
    "thin link": (1, 2, 10),
    "full disk": (1, 0.5, 6),
    "slow disk": (1, 1, 6),
    "failing write": (1, 0.5, 3),
    "failing fsync": (1, 0.5, 3),
    "die at disk call": (4, 0.2, 4),
    "die in checkpoint": (2, 0.2, 4),
    "damage checkpoint": (1, 0.2, 4),
    "damage log": (0.3, 0.2, 1),
}
# What else can go wrong where there are standbys.
CLUSTER_FAULTS: dict[str, tuple[float, float, float]] = {
    "kill standby": (3, 0.2, 8),
    "cut standby's power": (2, 0.2, 8),
    "freeze standby": (2, 0.5, 12),
    "cut servers apart": (3, 0.5, 12),
    "cut servers apart one way": (2, 0.5, 12),
    "cut a server from the witness": (2, 0.5, 12),
    "lose the witness": (1, 0.5, 8),
    "lose the server's site": (3, 4, 14),
    "lose all servers": (1, 0.5, 6),
    "promote": (2, 0, 0),
}
ALL_FAULTS = FAULTS | CLUSTER_FAULTS
# Damage that a run survives once only: there are two checkpoints, and the older one is needed then.
# With other nodes about, one that must halt need not end the run; what comes of it then is a scenario's subject.
NOT_IN_CLUSTERS = frozenset({"damage log", "damage checkpoint"})
ONCE = frozenset({"damage checkpoint", "damage log"})
FIRST_SECONDS, CHAOS_SECONDS = 0.5, 14.0
PRESSED = 0.75  # share of the worlds whose faults all strike while there is something to train
WORKERS_MAX = 12
CROWDED = 0.04  # share of the worlds
ARCHIVED = 0.2  # likewise
MIXED = 0.1  # likewise: not all workers train on shared data, and they evaluate
EVALUATES_EVERY = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """`target` is a worker, or the site at the far end of a link; `amount` depends on the kind."""

    at: float
    kind: str
    target: str
    seconds: float
    amount: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind} ({self.target}, {self.seconds:.1f} s)"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPlan:
    name: str
    site: str
    step_seconds: float
    batch: int = 2
    dtype: str = "fp32"
    joins_at: float = 0.0
    data: str = SHARED
    evaluates_every: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    seed: int
    settings: RunSettings
    workers: tuple[WorkerPlan, ...]
    links: dict[str, Condition]  # site → both directions between it and the server's site
    faults: tuple[Fault, ...] = ()
    healed_at: float = 0.0  # from then on nothing goes wrong, and what was broken is whole
    stays_away: str = ""  # a worker that is not healed
    dataset_samples: int = 96
    checkpoint_every: int = 2
    keep_log: bool = False
    segment_bytes: int = 16 * 1024
    chunk_bytes: int = 1024 * 1024
    work_seconds: float = 0.003  # what coding, applying or an fsync takes at most
    standbys: tuple[str, ...] = ()
    rules: Durability = Durability()  # noqa: RUF009, it is frozen
    backbone: Condition = Condition()  # noqa: RUF009, frozen too; between the sites of servers and of the witness
    archive: bool = False  # whoever serves archives

    @property
    def nodes(self) -> tuple[str, ...]:
        """The server that the run begins with, and its standbys."""
        return (SERVER, *self.standbys)

    def only(self, numbers: Iterable[int]) -> "Plan":
        """The same world with these of its faults, counted from 0. Raises UserError for a number that it has not."""
        numbers = list(numbers)
        for number in numbers:
            if not 0 <= number < len(self.faults):
                raise UserError(f"world {self.seed} has faults 0 to {len(self.faults) - 1}, and no fault {number}")
        return replace(self, faults=tuple(self.faults[number] for number in numbers))


def draw(seed: int, only: Sequence[str] = ()) -> Plan:
    """`only`: nothing but faults of these kinds."""
    random = Random(f"plan {seed}")
    sites = [f"site{number}" for number in range(random.randint(1, 3))]
    workers = [_worker(random, number, sites) for number in range(random.randint(2, 7))]
    workers += _crowd(Random(f"crowd {seed}"), len(workers), sites)
    if not only and Random(f"mixed {seed}").random() < MIXED:
        workers = _mixed(Random(f"data {seed}"), workers)
    cluster = _cluster(Random(f"cluster {seed}"), only)
    # A swarm of few kinds digs deeper than a mix of all.
    kinds = list(only) or random.sample(list(FAULTS), random.randint(2, 8))
    if cluster and not only:
        kinds = [kind for kind in kinds if kind not in NOT_IN_CLUSTERS][:4]
        kinds += random.sample(list(CLUSTER_FAULTS), random.randint(2, 5))
    faults = sorted(
        (_fault(random, kinds, workers, sites, cluster) for _ in range(random.randint(3, 14))),
        key=lambda fault: fault.at,
    )
    settings = _settings(random, seed)
    if not only and Random(f"press {seed}").random() < PRESSED:
        settings = replace(settings, samples=settings.samples * 2 // 3)
        faults = _pressed(faults, settings.samples, workers)
    return Plan(
        seed=seed,
        settings=settings,
        workers=tuple(workers),
        links={site: _link(random) for site in sites},
        faults=tuple(_once_each(faults)),
        healed_at=max(fault.at + fault.seconds for fault in faults) + 1,
        stays_away=random.choice(workers).name if len(workers) > 2 and random.random() < 0.2 else "",
        checkpoint_every=random.choice([1, 2, 4, 1000]),
        keep_log=random.random() < 0.3,
        segment_bytes=random.choice([4, 16, 256]) * 1024,
        chunk_bytes=random.choice([64, 1024 * 1024, 1024 * 1024]),
        work_seconds=random.choice([0.003, 0.03, 0.3]),
        standbys=cluster,
        rules=_rules(Random(f"rules {seed}")) if cluster else Durability(),
        backbone=_backbone(Random(f"backbone {seed}")),
        archive=not only and Random(f"archive {seed}").random() < ARCHIVED,
    )


def _mixed(random: Random, workers: Sequence[WorkerPlan]) -> list[WorkerPlan]:
    kinds = (SHARED, PRIVATE, STREAM)
    return [replace(worker, data=random.choice(kinds), evaluates_every=EVALUATES_EVERY) for worker in workers]


def _cluster(random: Random, only: Sequence[str]) -> tuple[str, ...]:
    """The standbys: in half of the worlds one or two; where only some kinds are wanted, as these need them."""
    names = ("b", "c")[: random.choice([1, 1, 2])]
    if only:
        return names if any(kind in CLUSTER_FAULTS for kind in only) else ()
    return names if random.random() < 0.5 else ()


def _rules(random: Random) -> Durability:
    has_witness = random.random() < 0.7
    return Durability(
        durability=random.choice(["local", "replicated", "replicated"]),
        when_alone="continue" if has_witness and random.random() < 0.3 else "wait",
        has_witness=has_witness,
        lease_ms=random.choice([2000, 4000]),
    )


def _settings(random: Random, seed: int) -> RunSettings:
    codecs = ["fp32", "bf16", "int8", "int4"]
    return RunSettings(
        run="simulated",
        seed=seed,
        samples=random.randint(80, 240),
        merge=random.choices(["window", "per-push", "all"], [5, 3, 2])[0],
        rule=random.choice(["nesterov", "lookahead", "sgd"]),
        steps_per_round=random.randint(2, 6),
        seconds_per_round=random.choice([0.0, 0.0, 1.0]),
        grace=random.choice([0.0, 0.25, 1.0]),
        max_staleness=random.choice([1, 2, 4]),
        codec_up=_coarse(random.choice(codecs), seed, "up", ["e3m0", "2bit", "2bit", "topk"]),
        codec_down=_coarse(random.choice(codecs), seed, "down", ["e3m0", "2bit"]),
        publish_every=random.choice([1, 1, 1, 2, 3]),
        lease_ttl_seconds=random.choice([3.0, 6.0, 10.0]),
    )


def _coarse(usual: str, seed: int, way: str, codecs: Sequence[str]) -> str:
    """In a quarter of the worlds one of the codecs that leave much out."""
    random = Random(f"codec {way} {seed}")
    return random.choice(codecs) if random.random() < 0.25 else usual


def _worker(random: Random, number: int, sites: list[str]) -> WorkerPlan:
    return WorkerPlan(
        name=f"w{number}",
        site=random.choice(sites),
        step_seconds=random.choice([0.1, 0.2, 0.2, 0.4, 0.8]),
        batch=random.randint(1, 3),
        dtype=random.choice(["fp32", "fp32", "bf16"]),
        joins_at=0.0 if number == 0 or random.random() < 0.7 else random.uniform(0, CHAOS_SECONDS),
    )


def _pressed(faults: Sequence[Fault], samples: int, workers: Sequence[WorkerPlan]) -> list[Fault]:
    """Moved forward, so that they strike before all is trained: in no world does training take less than this."""
    seconds = samples / sum(worker.batch / worker.step_seconds for worker in workers)
    share = min(1.0, seconds / CHAOS_SECONDS)
    return [replace(fault, at=round(max(FIRST_SECONDS, share * fault.at), 3)) for fault in faults]


def _crowd(random: Random, others: int, sites: list[str]) -> list[WorkerPlan]:
    """In few worlds so many more that there are 8 to 12, since such a world takes as long as several."""
    wanted = random.randint(8, WORKERS_MAX) if random.random() < CROWDED else 0
    return [_worker(random, number, sites) for number in range(others, wanted)]


def _link(random: Random) -> Condition:
    return Condition(
        delay=random.choice([0.001, 0.02, 0.15, 0.3]),
        jitter=random.choice([0.0, 0.01, 0.1]),
        loss=random.choice([0.0, 0.0, 0.01]),
    )


def _backbone(random: Random) -> Condition:
    """A lease must last several times as long as a question to the witness takes."""
    return Condition(
        delay=random.choice([0.001, 0.02, 0.05]),
        jitter=random.choice([0.0, 0.01, 0.05]),
        loss=random.choice([0.0, 0.0, 0.01]),
    )


def _fault(
    random: Random, kinds: list[str], workers: Sequence[WorkerPlan], sites: list[str], standbys: tuple[str, ...]
) -> Fault:
    kind = random.choices(kinds, [ALL_FAULTS[kind][0] for kind in kinds])[0]
    _, shortest, longest = ALL_FAULTS[kind]
    if kind in CLUSTER_FAULTS:
        return Fault(
            at=round(random.uniform(1.5, CHAOS_SECONDS), 3),
            kind=kind,
            target=random.choice(sites) if kind == "lose the server's site" else random.choice(standbys),
            seconds=round(random.uniform(shortest, longest), 3),
            amount=random.random(),
        )
    is_of_site = "link" in kind or "way" in kind or "site" in kind or kind.endswith(("messages", "connections"))
    return Fault(
        at=round(random.uniform(FIRST_SECONDS, CHAOS_SECONDS), 3),
        kind=kind,
        target=random.choice(sites) if is_of_site else random.choice(workers).name,
        seconds=round(random.uniform(shortest, longest), 3),
        amount=random.random(),
    )


def _once_each(faults: Sequence[Fault]) -> list[Fault]:
    """Of the kinds that may strike once, the last one: by then there is something to damage."""
    last = {fault.kind: fault for fault in faults}
    return [fault for fault in faults if fault.kind not in ONCE or last[fault.kind] is fault]
