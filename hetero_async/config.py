"""run.toml as frozen values: the only place that knows its keys, limits and defaults.

The command line and `join` load it, `init` writes it. Every complaint is one line that names the file, the key, the
value and what is allowed. It opens no log, key or socket; paths are only worked out here.
"""

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from hetero_async.core.records import RunSettings
from hetero_async.core.worker import HEARTBEAT_EVERY_MS
from hetero_async.errors import ConfigError

# How `hetero-async work` tells a training script what it is part of.
ENV_RUN = "HETERO_ASYNC_RUN"
ENV_WORKER = "HETERO_ASYNC_WORKER"

# A site's name is also the start of file names, key names and command-line arguments.
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
NAME_ALLOWED = "1 to 32 of a-z, 0-9 and -, not starting with -"
ADDRESS = re.compile(r"tcp://(?P<host>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):(?P<port>[1-9][0-9]{0,4})")
ADDRESS_ALLOWED = "tcp://HOST:PORT, for example tcp://127.0.0.1:7710"
PORT_MAX = 65_535
# A lease that is shorter than a few heartbeats would call a healthy worker dead.
LEASE_TTL_SECONDS_MIN = 3 * HEARTBEAT_EVERY_MS / 1000
VALUE_SHOWN_MAX = 60
LINE_LENGTH_MAX = 1000

# How a declaration reads in a complaint.
NOUNS: dict[object, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text in quotes"}
BOUNDS = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}

DEFAULTS = RunSettings(run="")
Merge = Literal["window", "per-push", "all"]
Rule = Literal["nesterov", "lookahead", "sgd"]
Codec = Literal["fp32", "bf16", "int8", "int4"]


class Table(BaseModel):
    """One table of run.toml. Each key's description is the comment that `template` writes beside it."""

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

    @property
    def bulk(self) -> str:
        """The address of the bulk connection."""
        host, port = self.address.rsplit(":", 1)
        return self.bulk_address or f"{host}:{int(port) + 1}"


class TrainingTable(Table):
    merge: Merge = Field(
        default=cast(Merge, DEFAULTS.merge),
        description="the server steps at deadlines, at every delta, or when all have pushed",
    )
    rule: Rule = Field(default=cast(Rule, DEFAULTS.rule), description="how the server steps")
    outer_learning_rate: float = Field(default=DEFAULTS.outer_learning_rate, gt=0, le=10, description="of that step")
    momentum: float = Field(default=DEFAULTS.momentum, ge=0, lt=1, description="of that step")
    steps_per_round: int = Field(default=DEFAULTS.steps_per_round, ge=1, description="of the fastest worker")
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
    codec_down: Codec = Field(default=cast(Codec, DEFAULTS.codec_down), description="how publishes are coded")
    publish_every: int = Field(default=DEFAULTS.publish_every, ge=1, description="outer steps between two publishes")
    lease_ttl_seconds: float = Field(
        default=DEFAULTS.lease_ttl_seconds,
        ge=LEASE_TTL_SECONDS_MIN,
        description="a worker not heard of for so long has left; its samples go to others",
    )


class SiteTable(Table):
    workers: int = Field(ge=0, le=1000, description="processes that train here")


class File(Table):
    run: RunTable
    server: ServerTable
    training: TrainingTable = TrainingTable()
    sites: dict[str, SiteTable]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A run.toml that has been read and found good. Attributes are named as the file's tables and keys are."""

    path: Path
    run: RunTable
    server: ServerTable
    training: TrainingTable
    sites: Mapping[str, SiteTable]

    @staticmethod
    def load(path: Path) -> "RunConfig":
        """Read run.toml. Raises ConfigError, one line, for the first thing that is wrong with it."""
        content = _read(path)
        try:
            file = File.model_validate(content)
        except ValidationError as error:
            raise ConfigError(f"{path}: {_first_complaint(error, content)}") from None
        for complaint in _contradictions(file):
            raise ConfigError(f"{path}: {complaint}")
        return RunConfig(path=path, run=file.run, server=file.server, training=file.training, sites=file.sites)

    def settings(self) -> RunSettings:
        """The part that the log's first record fixes."""
        run = self.run.model_dump(include={"seed", "samples", "passes"})
        return RunSettings(run=self.run.name, **run, **self.training.model_dump())

    @property
    def directory(self) -> Path:
        return (self.path.parent / self.run.directory).resolve()

    @property
    def keys(self) -> Path:
        return self.directory / "keys"

    @property
    def log(self) -> Path:
        return self.directory / "log"

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def worker_directory(self, worker: str) -> Path:
        """Where that worker keeps its outbox."""
        return self.directory / "workers" / worker

    def workers(self) -> list[tuple[str, str]]:
        """Every worker of the run as (site, worker's name)."""
        return [(site, f"{site}-{index}") for site, table in self.sites.items() for index in range(table.workers)]


def from_environment() -> tuple[RunConfig, str]:
    """The run and the worker's name that `hetero-async work` started this process for. Raises ConfigError."""
    if not os.environ.get(ENV_RUN) or not os.environ.get(ENV_WORKER):
        raise ConfigError(
            f"{ENV_RUN} and {ENV_WORKER} are not set; "
            "start this script with: hetero-async work --site NAME -- python train.py"
        )
    config, worker = RunConfig.load(Path(os.environ[ENV_RUN])), os.environ[ENV_WORKER]
    names = [name for _, name in config.workers()]
    if worker not in names:
        raise ConfigError(f"{ENV_WORKER} = {_shown(worker)}: must be {_one_of(names)} ({config.path})")
    return config, worker


def template(
    *,
    run: Mapping[str, object],
    sites: Mapping[str, int],
    server: Mapping[str, object] | None = None,
    training: Mapping[str, object] | None = None,
) -> str:
    """A commented run.toml with these values and the default of every other key. `sites`: workers per site."""
    goal = {} if "passes" in run else {"samples": EXAMPLES["samples"]}
    tables = [
        _table_text("run", RunTable, {**goal, **run}),
        _table_text("server", ServerTable, {"site": next(iter(sites), ""), **(server or {})}),
        _table_text("training", TrainingTable, training or {}),
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
    choices = " | ".join(_choices(field))
    return f"{text:<40} # {choices + ': ' if choices else ''}{field.description}"


# --- reading and complaining ---


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        # What the parser makes of a long dotted name takes memory by the square of its length.
        if max(map(len, text.splitlines()), default=0) > LINE_LENGTH_MAX:
            raise ConfigError(f"{path}: is not valid TOML: a line is longer than {LINE_LENGTH_MAX} characters")
        return tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; write one with: hetero-async init") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}") from None


def _first_complaint(error: ValidationError, content: Mapping[str, Any]) -> str:
    """Unknown keys come first: a misspelt key is also a missing one, and the spelling is the news."""
    details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    where, value, kind = details[0]["loc"], details[0]["input"], details[0]["type"]
    key, field_name = ".".join(str(part) for part in where), str(where[-1])
    known = _table_at(where[:-1]).model_fields if where[:-1] != ("sites",) else {}
    if kind == "extra_forbidden":
        return f"{key} = {_shown(value)}: unknown key{_closest(field_name, known)}; known keys: {', '.join(known)}"
    allowed = _allowed(known[field_name]) if field_name in known else "a table"
    if kind == "missing":
        return f"{key} is missing: must be {allowed}"
    return f"{key} = {_shown(value)}: must be {allowed}{_closest(value, _choices(known.get(field_name)))}"


def _table_at(where: tuple[int | str, ...]) -> type[Table]:
    tables: dict[object, type[Table]] = {"run": RunTable, "server": ServerTable, "training": TrainingTable}
    return (SiteTable if where[0] == "sites" else tables[where[0]]) if where else File


def _allowed(field: FieldInfo) -> str:
    """What a key may hold, in words, read off its declaration."""
    if choices := _choices(field):
        return _one_of(choices)
    bounds = " and ".join(filter(None, map(_bound, field.metadata)))
    return f"{NOUNS.get(field.annotation, 'a table')} {bounds}".strip()


def _bound(bound: object) -> str:
    found = [f"{words} {getattr(bound, name)}" for name, words in BOUNDS.items() if hasattr(bound, name)]
    return "".join(found).removesuffix(".0")


def _choices(field: FieldInfo | None) -> tuple[str, ...]:
    return get_args(field.annotation) if field and get_origin(field.annotation) is Literal else ()


def _one_of(names: list[str] | tuple[str, ...]) -> str:
    return "one of " + ", ".join(names) if len(names) != 1 else names[0]


def _closest(word: object, known: Any) -> str:
    close = difflib.get_close_matches(word, known, n=1) if isinstance(word, str) else []
    return f" (did you mean {close[0]}?)" if close else ""


def _shown(value: object) -> str:
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= VALUE_SHOWN_MAX else text[: VALUE_SHOWN_MAX - 1] + "…"


def _contradictions(file: File) -> Iterator[str]:
    """What is wrong although every key by itself has the right type and range."""
    if not NAME.fullmatch(file.run.name):
        yield f"run.name = {_shown(file.run.name)}: must be {NAME_ALLOWED}"
    if file.run.samples and file.run.passes:
        yield f"run.passes = {file.run.passes:g}: run.samples is given too; keep exactly one of them"
    if not file.run.samples and not file.run.passes:
        yield "run.samples is missing: exactly one of run.samples and run.passes must be given"
    yield from _bad_sites(file)
    yield from _bad_addresses(file.server)


def _bad_sites(file: File) -> Iterator[str]:
    for site in file.sites:
        if not NAME.fullmatch(site):
            yield f"sites.{site}: a site's name must be {NAME_ALLOWED}"
    if not any(table.workers for table in file.sites.values()):
        yield "sites: no site has a worker; give at least one table such as [sites.amsterdam] with workers = 1"
    if file.server.site not in file.sites:
        sites = tuple(file.sites)
        yield f"server.site = {_shown(file.server.site)}: must be {_one_of(sites)}{_closest(file.server.site, sites)}"


def _bad_addresses(server: ServerTable) -> Iterator[str]:
    """The control address first: the bulk address is derived from it."""
    given = {"server.address": server.address, "server.bulk_address": server.bulk_address}
    for key, address in given.items():
        matched = ADDRESS.fullmatch(address)
        if (address or key == "server.address") and not (matched and int(matched["port"]) <= PORT_MAX):
            yield f"{key} = {_shown(address)}: must be {ADDRESS_ALLOWED}"
            return
    if server.bulk == server.address:
        yield f"server.bulk_address = {_shown(server.bulk)}: must differ from server.address"
    if not server.bulk_address and int(server.bulk.rsplit(":", 1)[1]) > PORT_MAX:
        yield f"server.address = {_shown(server.address)}: no port is left for bulk; give server.bulk_address as well"
