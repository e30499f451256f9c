"""What run.toml may hold: its tables, keys, limits and defaults, and the commented file that `init` writes.

Each key's description is the comment beside it. complaints.py checks what a person wrote against it, config.py makes
the values that the rest of the software uses.
"""

import json
from collections.abc import Mapping
from typing import Literal, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from hetero_async.core.records import RunSettings
from hetero_async.core.worker import HEARTBEAT_EVERY_MS

# A lease that is shorter than a few heartbeats would call a healthy worker dead.
LEASE_TTL_SECONDS_MIN = 3 * HEARTBEAT_EVERY_MS / 1000

SITE_WORKERS_MAX = 1000

DEFAULTS = RunSettings(run="")
Merge = Literal["window", "per-push", "all"]
Rule = Literal["auto", "nesterov", "lookahead", "delayed-nesterov", "sgd"]
Weights = Literal["workers", "tokens"]
Codec = Literal["fp32", "bf16", "int8", "int4", "e3m0", "2bit", "topk"]
# A publish that leaves out nearly all of its parameters would keep workers far from where the server stands.
CodecDown = Literal["fp32", "bf16", "int8", "int4", "e3m0", "2bit"]
Durability = Literal["local", "replicated"]
Probe = Literal["warn", "refuse", "off"]
Extreme = Literal["min", "max"]
WhenAlone = Literal["wait", "continue"]
DASHBOARD = "http://127.0.0.1:7720"
ABOUT_DASHBOARD = (
    'a page to watch the run on, "": none; read only, without a password: on another address than 127.0.0.1'
    " whoever reaches it sees names, devices, figures and speeds"
)


class Table(BaseModel):
    """One table of run.toml."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class RunTable(Table):
    name: str = Field(description="shown everywhere, and checked: a log belongs to one run")
    directory: str = Field(default=".", description="of log, checkpoints, outboxes and keys; relative to this file")
    samples: int = Field(default=DEFAULTS.samples, gt=0, description="train on so many, however many passes that takes")
    passes: float = Field(default=DEFAULTS.passes, gt=0, description="instead: so many passes over the dataset")
    seed: int = Field(default=DEFAULTS.seed, ge=0, lt=1 << 32, description="of the order in which samples are drawn")


class ServerTable(Table):
    site: str = Field(description="the site that the server runs in")
    address: str = Field(default="tcp://127.0.0.1:7710", description="where workers reach it")
    bulk_address: str = Field(default="", description="the same for deltas and publishes; if not given, the next port")
    checkpoint_every: int = Field(default=50, ge=1, description="outer steps from one checkpoint to the next")
    keep_log: bool = Field(default=False, description="true: never drop old log segments (audit, exact replay)")
    keep_best: str = Field(
        default="", description="keep the parameters that this figure of session.evaluate found best: export --best"
    )
    keep_best_is: Extreme = Field(default="min", description="whether the smallest or the largest figure is the best")
    durability: Durability = Field(
        default="local", description="acknowledge when this disk has it, or when a standby's has it as well"
    )
    when_alone: WhenAlone = Field(
        default="wait", description="replicated, and no standby in reach: wait for one, or go on (needs a witness)"
    )
    archive: str = Field(
        default="",
        description="checkpoints and log go here too: s3://BUCKET/PREFIX, gs://…, az://… or a directory;"
        " endpoint and credentials come from the environment: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, …",
    )
    dashboard: str = Field(default=DASHBOARD, description=ABOUT_DASHBOARD)


class TrainingTable(Table):
    merge: Merge = Field(
        default=cast(Merge, DEFAULTS.merge),
        description="the server steps at deadlines, at every delta, or when all have pushed",
    )
    rule: Rule = Field(default=cast(Rule, DEFAULTS.rule), description="how the server steps")
    outer_learning_rate: float = Field(
        default=DEFAULTS.outer_learning_rate, gt=0, le=10, description="of that step; auto has its own"
    )
    momentum: float = Field(default=DEFAULTS.momentum, ge=0, lt=1, description="of that step; auto has its own")
    weights: Weights = Field(
        default=cast(Weights, DEFAULTS.weights),
        description="a merge averages over workers, or over what they trained on",
    )
    staleness_exponent: float = Field(
        default=DEFAULTS.staleness_exponent, ge=0, le=4, description="a: a delta of age t weighs (1 + t)^-a"
    )
    warm_up_rounds: int = Field(
        default=DEFAULTS.warm_up_rounds, ge=0, description="the first deltas of a late joiner weigh less"
    )
    quorum: int = Field(default=DEFAULTS.quorum, ge=1, description="fewer workers' deltas wait for the next window")
    steps_per_round: int = Field(
        default=DEFAULTS.steps_per_round, ge=1, description="of the fastest worker; more where links need it"
    )
    dylu: bool = Field(default=DEFAULTS.dylu, description="slower workers do fewer steps a round (DyLU)")
    seconds_per_round: float = Field(
        default=DEFAULTS.seconds_per_round, ge=0, description="a round's length; 0: steps_per_round decides it"
    )
    grace: float = Field(
        default=DEFAULTS.grace, ge=0, le=1, description="a merge waits so long for late deltas; share of a round"
    )
    max_staleness: int = Field(default=DEFAULTS.max_staleness, ge=0, description="rounds; an older delta is refused")
    norm_gate: float = Field(
        default=DEFAULTS.norm_gate, ge=0, description="refuse a delta so many times longer than the median; 0: never"
    )
    codec_up: Codec = Field(default=cast(Codec, DEFAULTS.codec_up), description="how deltas are coded")
    codec_down: CodecDown = Field(default=cast(CodecDown, DEFAULTS.codec_down), description="how publishes are coded")
    publish_every: int = Field(default=DEFAULTS.publish_every, ge=1, description="outer steps between two publishes")
    lease_ttl_seconds: float = Field(
        default=DEFAULTS.lease_ttl_seconds,
        ge=LEASE_TTL_SECONDS_MIN,
        description="a worker not heard of for so long has left; its samples go to others",
    )
    probe: Probe = Field(
        default=cast(Probe, DEFAULTS.probe),
        description="what becomes of a worker whose layers answer otherwise than the first worker's",
    )


class StandbyTable(Table):
    site: str = Field(description="the site that this standby runs in")
    address: str = Field(description="where workers and other servers reach it")
    bulk_address: str = Field(default="", description="the same for deltas and publishes; if not given, the next port")
    directory: str = Field(default="", description="of its log and checkpoints; if not given, standby-NAME")
    dashboard: str = Field(default=DASHBOARD, description=ABOUT_DASHBOARD)


def bulk_address(table: ServerTable | StandbyTable) -> str:
    """The address of the bulk connection."""
    host, port = table.address.rsplit(":", 1)
    return table.bulk_address or f"{host}:{int(port) + 1}"


class WitnessTable(Table):
    etcd: list[str] = Field(default=[], description="URLs of an etcd cluster; with it a standby takes over by itself")
    lease_seconds: float = Field(
        default=5.0, ge=1, le=60, description="a server not heard of for so long is taken over from"
    )


class SiteTable(Table):
    workers: int = Field(ge=0, le=SITE_WORKERS_MAX, description="processes that train here")


class PlanSiteTable(Table):
    workers: int = Field(gt=0, le=SITE_WORKERS_MAX, description="processes that train here")
    step: str | float = Field(description='one worker\'s time from step to step: seconds, or "800ms"')
    batch: int = Field(default=1, gt=0, description="samples of one worker's step")
    up: str | float = Field(default="", description='the site\'s link, to the server: bytes a second, or "100Mbit"')
    down: str | float = Field(default="", description="the same, from the server")
    delay: str | float = Field(default=0.0, description='one way, half of what ping shows: seconds, or "40ms"')


class PlanTable(Table):
    parameters: float = Field(default=0.0, ge=0, description="that the model trains")
    up: str | float = Field(default="", description="the link of the server's site, from it; if not given, no limit")
    down: str | float = Field(default="", description="the same, to it")
    slow_start: bool = Field(default=True, description="TCP begins slowly after a rest, as Linux has it without BBR")
    sites: dict[str, PlanSiteTable] = {}


class File(Table):
    run: RunTable
    server: ServerTable
    training: TrainingTable = TrainingTable()
    sites: dict[str, SiteTable] = {}
    standbys: dict[str, StandbyTable] = {}
    witness: WitnessTable = WitnessTable()
    plan: PlanTable = PlanTable()  # read by `plan` alone


def template(
    *,
    run: Mapping[str, object],
    sites: Mapping[str, int],
    server: Mapping[str, object] | None = None,
    training: Mapping[str, object] | None = None,
    standbys: Mapping[str, Mapping[str, object]] | None = None,
    witness: Mapping[str, object] | None = None,
) -> str:
    """A commented run.toml with these values and the default of every other key. `sites`: workers per site."""
    goal = {} if "passes" in run else {"samples": EXAMPLES["samples"]}
    tables = [
        _table_text("run", RunTable, {**goal, **run}),
        _table_text("server", ServerTable, {"site": next(iter(sites), "server"), **(server or {})}),
        _table_text("training", TrainingTable, training or {}),
        _table_text("witness", WitnessTable, witness or {}),
        *(_table_text(f"standbys.{name}", StandbyTable, values) for name, values in (standbys or {}).items()),
        *(_table_text(f"sites.{site}", SiteTable, {"workers": workers}) for site, workers in sites.items()),
    ]
    return "\n".join(["# A run of hetero-async. Every key that there is stands here.", "", *tables])


# Keys whose default means "not given", which cannot be written down; commented out, they show this instead.
EXAMPLES: dict[str, object] = {"samples": 200_000, "passes": 3.0, "bulk_address": "tcp://127.0.0.1:7711"}


def _table_text(name: str, table: type[Table], values: Mapping[str, object]) -> str:
    assert values.keys() <= table.model_fields.keys(), f"[{name}] has no such key: {values}"
    lines = [_line(key, field, values) for key, field in table.model_fields.items()]
    return "\n".join([f"[{name}]", *lines, ""])


def _line(key: str, field: FieldInfo, values: Mapping[str, object]) -> str:
    is_example = key in EXAMPLES and key not in values
    value = EXAMPLES[key] if is_example else values.get(key, field.default)
    text = f"{'# ' if is_example else ''}{key} = {json.dumps(value, ensure_ascii=False)}"
    words = " | ".join(choices(field))
    return f"{text:<40} # {words + ': ' if words else ''}{field.description}"


def choices(field: FieldInfo | None) -> tuple[str, ...]:
    """What may be chosen from, where that is a list of words."""
    return get_args(field.annotation) if field and get_origin(field.annotation) is Literal else ()
