"""From what a person wrote to what plan.py reckons with: [plan] in a TOML file, `--site` on the command line, units.

The file is a run.toml, whose settings and goal then count, or one with nothing but [plan] and perhaps [training].
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hetero_async.complaints import checked, read_toml, shown
from hetero_async.core.records import RunSettings
from hetero_async.errors import UserError
from hetero_async.tables import PlanSiteTable
from hetero_async.watch.timing import Question, Site

QUANTITY = re.compile(r"\s*(?P<number>[0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(?P<unit>[A-Za-z]*)(?:/s|ps)?\s*")
PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
# "Mb" is not among them: some mean bits by it, others bytes.
RATES = {"": 1.0} | {
    f"{prefix}{unit}": of * in_bytes
    for prefix, of in PREFIXES.items()
    for unit, in_bytes in (("bit", 1 / 8), ("B", 1.0))
}
TIMES = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0}
RATE_ALLOWED = 'bytes a second, or with a unit such as "100Mbit", "1Gbit" or "12MB"'
TIME_ALLOWED = 'seconds, or with a unit such as "800ms"'
SITE_ALLOWED = "NAME:workers=8,step=1.2,up=100Mbit,down=1Gbit,delay=80ms"
# What a plan's own file leaves open, and no figure depends on.
STAND_INS: Mapping[str, Any] = {"run": {"name": "plan", "samples": 1}, "server": {"site": "server"}}


def question_of(path: Path | None, parameters: float, sites: Sequence[str], samples: int) -> Question:
    """What was asked; options replace what the file says. Raises UserError."""
    content = dict(read_toml(path)) if path is not None else {}
    is_run = "run" in content
    plan = dict(content.get("plan", {}))
    if parameters:
        plan["parameters"] = float(parameters)
    if sites:
        plan["sites"] = dict(site_of(given) for given in sites)
    source = str(path) if path is not None else "--site"
    file = checked({**STAND_INS, **content, "plan": plan}, source)
    if not file.plan.parameters:
        raise UserError(f"{source}: how large is the model? give plan.parameters, or --parameters 7e9")
    if not file.plan.sites:
        raise UserError(f"{source}: which sites? give tables such as [plan.sites.amsterdam], or --site {SITE_ALLOWED}")
    return Question(
        parameters=file.plan.parameters,
        settings=RunSettings(run=file.run.name, **file.training.model_dump()),
        sites=tuple(_site(source, name, table) for name, table in file.plan.sites.items()),
        samples=samples or (file.run.samples if is_run else 0),
        up=rate(f"{source}: plan.up", file.plan.up),
        down=rate(f"{source}: plan.down", file.plan.down),
        begins_slowly=file.plan.slow_start,
        checkpoint_every=file.server.checkpoint_every,
        keep_log=file.server.keep_log,
    )


def _site(source: str, name: str, table: PlanSiteTable) -> Site:
    where = f"{source}: plan.sites.{name}"
    step, delay = seconds(f"{where}.step", table.step), seconds(f"{where}.delay", table.delay)
    if step <= 0:
        raise UserError(f"{where}.step = {shown(table.step)}: must be greater than 0")
    return Site(
        name=name, workers=table.workers, step_seconds=step, batch=table.batch, delay=delay,
        up=rate(f"{where}.up", table.up), down=rate(f"{where}.down", table.down),
    )  # fmt: skip


def site_of(given: str) -> tuple[str, dict[str, Any]]:
    """`--site`, as a table of the file would be read. Raises UserError."""
    name, colon, rest = given.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",")]
    if not name or not colon or not all(equals and value for _, equals, value in pairs):
        raise UserError(f"--site {given}: must be like {SITE_ALLOWED}")
    return name, {key.strip(): int(value) if value.strip().isdigit() else value.strip() for key, _, value in pairs}


def rate(key: str, given: str | float) -> float:
    """Bytes per second; infinite where nothing is given. Raises UserError."""
    return _quantity(key, given, RATES, RATE_ALLOWED) if given != "" else math.inf


def seconds(key: str, given: str | float) -> float:
    """Raises UserError."""
    return _quantity(key, given, TIMES, TIME_ALLOWED)


def _quantity(key: str, given: str | float, units: Mapping[str, float], allowed: str) -> float:
    matched = QUANTITY.fullmatch(str(given))
    factor = units.get(matched["unit"]) if matched else None
    try:
        number = float(matched["number"]) if matched else math.nan
    except ValueError:
        number = math.nan
    if factor is None or not math.isfinite(number):
        raise UserError(f"{key} = {shown(given)}: must be {allowed}")
    return number * factor
