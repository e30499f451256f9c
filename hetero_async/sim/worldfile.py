"""A world file: sites, links, faults, model and rule of a learning study, read and checked.

Every complaint is one line that names the file, the key, the value and what is allowed. Variants are the same file
with some keys replaced, so each is read and checked as a whole file.
"""

import difflib
import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from hetero_async.complaints import NAME, NAME_ALLOWED
from hetero_async.core.records import RunSettings
from hetero_async.errors import ConfigError
from hetero_async.sim.corpus import Corpus, domains, standard_library
from hetero_async.sim.network import Condition
from hetero_async.sim.plan import FAULTS, Fault, Plan, WorkerPlan
from hetero_async.sim.text import Shape
from hetero_async.tables import Table, TrainingTable

# What a variant may have of its own; the rest is what makes a comparison one.
VARIED = ("run", "model", "sites", "faults", "lost_pushes", "steps", "samples")
# A run that ends by halting has nothing to show.
FATAL_FAULTS = ("damage log",)
OF_SITE = ("link", "way", "site", "messages", "connections")
OF_WORKER = ("worker", "leave")
VALUE_SHOWN_MAX = 60
# A real machine's log and checkpoints, where a world of faults has tiny ones.
SEGMENT_BYTES = 1024 * 1024
CHECKPOINT_EVERY = 50

SHAPE = Shape()


class ModelTable(Table):
    layers: int = Field(default=SHAPE.layers, ge=1, le=16)
    width: int = Field(default=SHAPE.width, ge=8, le=512)
    heads: int = Field(default=SHAPE.heads, ge=1, le=16)
    context: int = Field(default=SHAPE.context, ge=4, le=1024)
    learning_rate: float = Field(default=SHAPE.learning_rate, gt=0, le=1)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    text: Literal["shared", "by site"] = "shared"  # by site: a domain of text for each
    batch: int = Field(default=16, ge=1, le=1024)
    seed: int = Field(default=0, ge=0, lt=1 << 32)  # of the first weights; each run's own seed is added


class SiteTable(Table):
    workers: int = Field(ge=0, le=64)
    step_seconds: float = Field(gt=0)
    batch: int = Field(default=0, ge=0, le=1024)  # 0: the model's
    dtype: Literal["fp32", "bf16"] = "fp32"
    joins_at: float = Field(default=0.0, ge=0)
    # The link to the server's site, each way.
    delay: float = Field(default=0.001, ge=0)
    jitter: float = Field(default=0.0, ge=0)
    loss: float = Field(default=0.0, ge=0, lt=1)
    bytes_per_second: float = Field(default=0.0, ge=0)  # 0: no limit


class FaultTable(Table):
    at: float = Field(ge=0)
    kind: str
    target: str = ""
    seconds: float = Field(default=0.0, ge=0)
    amount: float = Field(default=0.5, ge=0, le=1)


class EvaluationTable(Table):
    points: int = Field(default=40, ge=1, le=10_000)  # of a curve, about
    windows: int = Field(default=256, ge=1, le=65_536)


class WorldTable(Table):
    name: str
    seeds: list[int] = Field(default=[0], min_length=1, max_length=1000)
    steps: int = Field(default=0, ge=0)  # of all workers together, each of the model's batch
    samples: int = Field(default=0, ge=0)  # instead of steps
    run: TrainingTable = TrainingTable()
    model: ModelTable = ModelTable()
    sites: dict[str, SiteTable]
    faults: list[FaultTable] = Field(default=[])
    lost_pushes: float = Field(default=0.0, ge=0, lt=1)  # this share is refused, and its samples go to others
    evaluation: EvaluationTable = EvaluationTable()


def titled(case: str, name: str) -> str:
    return f"{case}: {name}" if case else name


@dataclass(frozen=True, slots=True)
class Variant:
    """One world of a study; with a seed it is one simulated run. `case`: where on the file's axes it lies."""

    name: str
    world: WorldTable
    case: str = ""

    @property
    def title(self) -> str:
        return titled(self.case, self.name)

    @property
    def samples(self) -> int:
        return self.world.samples or self.world.steps * self.world.model.batch

    def shape(self) -> Shape:
        return Shape(**self.world.model.model_dump(exclude={"batch", "seed", "text"}))

    def corpus(self) -> Corpus:
        """Raises UserError where this machine lacks it."""
        return domains(tuple(self.world.sites)) if self.world.model.text == "by site" else standard_library()

    def workers(self) -> tuple[WorkerPlan, ...]:
        return tuple(
            WorkerPlan(
                name=f"{site}-{number}", site=site, step_seconds=table.step_seconds, dtype=table.dtype,
                batch=table.batch or self.world.model.batch, joins_at=table.joins_at,
            )
            for site, table in self.world.sites.items()
            for number in range(table.workers)
        )  # fmt: skip

    def plan(self, seed: int) -> Plan:
        world, workers = self.world, self.workers()
        ends = [fault.at + fault.seconds for fault in world.faults]
        return Plan(
            seed=seed,
            settings=RunSettings(run=world.name, seed=seed, samples=self.samples, **world.run.model_dump()),
            workers=workers,
            links={site: _condition(table) for site, table in world.sites.items()},
            faults=tuple(Fault(**fault.model_dump()) for fault in sorted(world.faults, key=lambda fault: fault.at)),
            healed_at=max([*ends, *(worker.joins_at for worker in workers)], default=0.0),
            checkpoint_every=CHECKPOINT_EVERY,
            segment_bytes=SEGMENT_BYTES,
        )

    def settings(self) -> dict[str, Any]:
        """JSON-able: everything that makes this world what it is, defaults included."""
        return {"samples": self.samples, **self.world.model_dump(exclude={"name", "seeds", "steps", "samples"})}


def _condition(site: SiteTable) -> Condition:
    rate = site.bytes_per_second or math.inf
    return Condition(delay=site.delay, jitter=site.jitter, loss=site.loss, bytes_per_second=rate)


class CellTable(Table):
    """What a file's variants are compared for: those to `reach` must come so near to the best of `choose`."""

    title: str
    choose: list[str] = Field(min_length=1)  # tried with the first seed; the best by other text goes on with the rest
    reach: dict[str, float] = Field(min_length=1)  # nats above the yardstick's loss, at most
    faster_than: str = ""  # a variant of which `reach` may take this share of the time
    time_share: float = Field(default=1.0, gt=0)
    idle_share: float = Field(default=1.0, ge=0, le=1)  # of the workers' time, at most
    once: list[str] = Field(default=[])  # variants that are run with the first seed only


@dataclass(frozen=True, slots=True)
class StudyFile:
    name: str
    variants: list[Variant]
    cell: CellTable | None


def load(path: Path) -> StudyFile:
    """All variants of a world file, in every case; the file itself where it has none. Raises ConfigError, one line.

    `[axes.A.B]` is what is different at B on the axis A; every variant is run in every combination of them.
    """
    content = _read(path)
    given, axes, cell = content.pop("variants", {}), content.pop("axes", {}), content.pop("cell", None)
    name = _checked(path, content, ()).name
    variants: list[Variant] = []
    for case, base in _cases(path, content, axes):
        if not given:
            variants.append(Variant(name, _checked(path, base, ("axes",)), case))
        for variant, changes in _tables(path, ("variants",), given):
            where = ("variants", variant)
            _check_varied(path, where, changes)
            variants.append(Variant(variant, _checked(path, _replaced(base, changes), where), case))
    return StudyFile(name, variants, None if cell is None else _cell(path, cell, list(given)))


def _cases(path: Path, content: dict[str, Any], axes: object) -> Iterator[tuple[str, dict[str, Any]]]:
    cases: list[tuple[tuple[str, ...], dict[str, Any]]] = [((), content)]
    for axis, places in _tables(path, ("axes",), axes):
        for place, changes in _tables(path, ("axes", axis), places):
            _check_varied(path, ("axes", axis, place), changes)
        cases = [
            ((*case, f"{axis} {place}"), _replaced(base, changes))
            for case, base in cases
            for place, changes in places.items()
        ]
    return ((", ".join(case), base) for case, base in cases)


def _check_varied(path: Path, where: Sequence[str], changes: object) -> None:
    for key, value in _tables(path, where, changes):
        if key not in VARIED:
            raise _unknown(path, (*where, key), value, VARIED)


def _cell(path: Path, given: object, variants: Sequence[str]) -> CellTable:
    try:
        cell = CellTable.model_validate(given)
    except ValidationError as error:
        raise _complaint(path, error, ("cell",)) from None
    named = [("choose", cell.choose), ("reach", list(cell.reach)), ("once", cell.once)]
    for key, names in [*named, ("faster_than", [cell.faster_than] if cell.faster_than else [])]:
        for name in names:
            if name not in variants:
                raise ConfigError(f"{path}: cell.{key} = {_shown(name)}: must be one of {', '.join(variants)}")
    return cell


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}") from None


def _tables(path: Path, where: Sequence[str], given: object) -> Iterator[tuple[str, Any]]:
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: {_key(where)} = {_shown(given)}: must be a table")
    yield from given.items()


def _replaced(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The first with what the second says otherwise, table by table."""
    merged = dict(content)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _replaced(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _checked(path: Path, content: Mapping[str, Any], where: Sequence[str]) -> WorldTable:
    """`where`: the table of the variant that changed something, or nothing."""
    try:
        world = WorldTable.model_validate(content)
    except ValidationError as error:
        raise _complaint(path, error, where) from None
    for key, value, allowed in _contradictions(world):
        raise ConfigError(f"{path}: {_key((*where, key))} = {_shown(value)}: must be {allowed}")
    return world


def _complaint(path: Path, error: ValidationError, where: Sequence[str]) -> ConfigError:
    """Unknown keys come first: a misspelt key is also a missing one, and the spelling is the news."""
    detail = min(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    location, value = detail["loc"], detail["input"]
    key = (*where, *map(str, location))
    if detail["type"] == "extra_forbidden":
        table = CellTable if where == ("cell",) else _table_at(location[:-1])
        return _unknown(path, key, value, list(table.model_fields))
    allowed = detail["msg"].replace("Input should be", "must be").replace("valid dictionary or instance of", "table,")
    if detail["type"] == "missing":
        return ConfigError(f"{path}: {_key(key)} is missing")
    return ConfigError(f"{path}: {_key(key)} = {_shown(value)}: {allowed}")


def _table_at(location: Sequence[int | str]) -> type[BaseModel]:
    tables: dict[object, type[BaseModel]] = {
        "run": TrainingTable, "model": ModelTable, "sites": SiteTable, "faults": FaultTable,
        "evaluation": EvaluationTable,
    }  # fmt: skip
    return tables[location[0]] if location else WorldTable


def _unknown(path: Path, key: Sequence[str], value: object, known: Sequence[str]) -> ConfigError:
    close = difflib.get_close_matches(key[-1], known, n=1)
    meant = f" (did you mean {close[0]}?)" if close else ""
    return ConfigError(f"{path}: {_key(key)} = {_shown(value)}: unknown key{meant}; known keys: {', '.join(known)}")


def _contradictions(world: WorldTable) -> Iterator[tuple[str, object, str]]:
    """What is wrong although every key by itself has the right type and range: key, value, what is allowed."""
    if not NAME.fullmatch(world.name):
        yield "name", world.name, NAME_ALLOWED
    if bool(world.steps) == bool(world.samples):
        yield "steps", world.steps, "greater than 0, or else samples must be; exactly one of the two"
    if world.model.width % world.model.heads:
        yield "model.width", world.model.width, f"a multiple of model.heads = {world.model.heads}"
    if len(dict.fromkeys(world.seeds)) < len(world.seeds):
        yield "seeds", ", ".join(map(str, world.seeds)), "different numbers"
    for site in world.sites:
        if not NAME.fullmatch(site):
            yield "sites", site, NAME_ALLOWED
    if not any(table.workers and not table.joins_at for table in world.sites.values()):
        yield "sites", ", ".join(world.sites), "tables of which one has workers that join at 0"
    yield from _bad_faults(world)


def _bad_faults(world: WorldTable) -> Iterator[tuple[str, object, str]]:
    kinds = [kind for kind in FAULTS if kind not in FATAL_FAULTS]
    sites = list(world.sites)
    workers = [f"{site}-{number}" for site, table in world.sites.items() for number in range(table.workers)]
    for number, fault in enumerate(world.faults):
        if fault.kind not in kinds:
            yield f"faults.{number}.kind", fault.kind, f"one of {', '.join(kinds)}"
        targets = sites if _is_of(fault.kind, OF_SITE) else workers if _is_of(fault.kind, OF_WORKER) else [fault.target]
        if fault.target not in targets:
            yield f"faults.{number}.target", fault.target, f"one of {', '.join(targets)}"


def _is_of(kind: str, words: Sequence[str]) -> bool:
    return any(word in kind for word in words)


def _key(parts: Sequence[str]) -> str:
    return ".".join(parts)


def _shown(value: object) -> str:
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= VALUE_SHOWN_MAX else text[: VALUE_SHOWN_MAX - 1] + "…"
