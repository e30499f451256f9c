"""Reads run.toml and says in one line what is wrong with it: file, key, value, what is allowed, and what was meant."""

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from hetero_async.errors import ConfigError
from hetero_async.tables import (
    File,
    PlanSiteTable,
    PlanTable,
    RunTable,
    ServerTable,
    SiteTable,
    StandbyTable,
    Table,
    TrainingTable,
    WitnessTable,
    bulk_address,
    choices,
)

SERVER = "server"  # the name of the node that the run began with
OPERATOR = "operator"
# A site's name is also the start of file names, key names and command-line arguments.
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
NAME_ALLOWED = "1 to 32 of a-z, 0-9 and -, not starting with -"
ADDRESS = re.compile(r"tcp://(?P<host>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):(?P<port>[1-9][0-9]{0,4})")
ADDRESS_ALLOWED = "tcp://HOST:PORT, for example tcp://127.0.0.1:7710"
PORT_MAX = 65_535
URL = re.compile(r"https?://[A-Za-z0-9.:\[\]-]+")
PAGE = re.compile(r"http://(?P<host>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):(?P<port>[1-9][0-9]{0,4})/?")
PAGE_ALLOWED = 'http://HOST:PORT, for example http://127.0.0.1:7720, or "" for none'
URL_ALLOWED = "http://HOST:PORT, for example http://10.0.0.1:2379"
VALUE_SHOWN_MAX = 60
LINE_LENGTH_MAX = 1000

# How a declaration reads in a complaint.
NOUNS: dict[object, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text in quotes",
    list[str]: "a list",
    str | float: "a number, or text in quotes",
}
BOUNDS = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}


def read(path: Path) -> File:
    """Raises ConfigError for the first thing that is wrong with the file."""
    return checked(read_toml(path), str(path))


def checked(content: Mapping[str, Any], source: str) -> File:
    """The same for what has come from `source` in another way."""
    try:
        file = File.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_first_complaint(error, content)}") from None
    for complaint in _contradictions(file):
        raise ConfigError(f"{source}: {complaint}")
    return file


def read_toml(path: Path) -> dict[str, Any]:
    """What stands there, unchecked. Raises ConfigError."""
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
    known = _table_at(where[:-1]).model_fields if where[:-1] not in OF_NAMES else {}
    if kind == "extra_forbidden":
        return f"{key} = {shown(value)}: unknown key{_closest(field_name, known)}; known keys: {', '.join(known)}"
    allowed = _allowed(known[field_name]) if field_name in known else "a table"
    if kind == "missing":
        return f"{key} is missing: must be {allowed}"
    return f"{key} = {shown(value)}: must be {allowed}{_closest(value, choices(known.get(field_name)))}"


def _table_at(where: tuple[int | str, ...]) -> type[Table]:
    return TABLES[where[:2] if where[:2] in OF_NAMES else where[:1]] if where else File


# Tables of tables, whose keys are names that somebody chose.
OF_NAMES = (("sites",), ("standbys",), ("plan", "sites"))
TABLES: dict[object, type[Table]] = {
    ("run",): RunTable, ("server",): ServerTable, ("training",): TrainingTable, ("witness",): WitnessTable,
    ("standbys",): StandbyTable, ("sites",): SiteTable, ("plan",): PlanTable, ("plan", "sites"): PlanSiteTable,
}  # fmt: skip


def _allowed(field: FieldInfo) -> str:
    """What a key may hold, in words, read off its declaration."""
    if words := choices(field):
        return one_of(words)
    bounds = " and ".join(filter(None, map(_bound, field.metadata)))
    return f"{NOUNS.get(field.annotation, 'a table')} {bounds}".strip()


def _bound(bound: object) -> str:
    found = [f"{words} {getattr(bound, name)}" for name, words in BOUNDS.items() if hasattr(bound, name)]
    return "".join(found).removesuffix(".0")


def one_of(names: list[str] | tuple[str, ...]) -> str:
    return "one of " + ", ".join(names) if len(names) != 1 else names[0]


def _closest(word: object, known: Any) -> str:
    close = difflib.get_close_matches(word, known, n=1) if isinstance(word, str) else []
    return f" (did you mean {close[0]}?)" if close else ""


def shown(value: object) -> str:
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= VALUE_SHOWN_MAX else text[: VALUE_SHOWN_MAX - 1] + "…"


def _contradictions(file: File) -> Iterator[str]:
    """What is wrong although every key by itself has the right type and range."""
    if not NAME.fullmatch(file.run.name):
        yield f"run.name = {shown(file.run.name)}: must be {NAME_ALLOWED}"
    if file.run.samples and file.run.passes:
        yield f"run.passes = {file.run.passes:g}: run.samples is given too; keep exactly one of them"
    if not file.run.samples and not file.run.passes:
        yield "run.samples is missing: exactly one of run.samples and run.passes must be given"
    yield from _bad_sites(file)
    yield from _bad_addresses(file)
    yield from _bad_standbys(file)


def _bad_sites(file: File) -> Iterator[str]:
    for site in file.sites:
        if not NAME.fullmatch(site):
            yield f"sites.{site}: a site's name must be {NAME_ALLOWED}"
    for key, table in _servers(file).items():
        if not NAME.fullmatch(table.site):
            yield f"{key}.site = {shown(table.site)}: must be {NAME_ALLOWED}"


def _servers(file: File) -> dict[str, ServerTable | StandbyTable]:
    """By the name of their table."""
    return {"server": file.server} | {f"standbys.{name}": table for name, table in file.standbys.items()}


def _bad_addresses(file: File) -> Iterator[str]:
    """The control address first: the bulk address is derived from it."""
    taken: dict[str, str] = {}
    for name, table in _servers(file).items():
        page = PAGE.fullmatch(table.dashboard)
        if table.dashboard and not (page and int(page["port"]) <= PORT_MAX):
            yield f"{name}.dashboard = {shown(table.dashboard)}: must be {PAGE_ALLOWED}"
    for name, table in _servers(file).items():
        for key, address in {f"{name}.address": table.address, f"{name}.bulk_address": table.bulk_address}.items():
            matched = ADDRESS.fullmatch(address)
            if (address or key.endswith(".address")) and not (matched and int(matched["port"]) <= PORT_MAX):
                yield f"{key} = {shown(address)}: must be {ADDRESS_ALLOWED}"
                return
        if not table.bulk_address and int(bulk_address(table).rsplit(":", 1)[1]) > PORT_MAX:
            yield f"{name}.address = {shown(table.address)}: no port is left for bulk; give {name}.bulk_address as well"
        for key, address in {f"{name}.address": table.address, f"{name}.bulk_address": bulk_address(table)}.items():
            if address in taken:
                yield f"{key} = {shown(address)}: must differ from {taken[address]}"
            taken[address] = key


def _bad_standbys(file: File) -> Iterator[str]:
    workers = {f"{site}-{index}" for site, table in file.sites.items() for index in range(table.workers)}
    for name in file.standbys:
        if not NAME.fullmatch(name) or name in (SERVER, OPERATOR) or name in workers:
            yield f"standbys.{name}: a standby's name must be {NAME_ALLOWED}, and not that of a worker or of the server"
    if file.server.durability == "replicated" and not file.standbys:
        yield 'server.durability = "replicated": needs a standby; give at least one table such as [standbys.b]'
    if file.server.when_alone == "continue" and not file.witness.etcd:
        yield 'server.when_alone = "continue": needs a witness, or two servers could go on at once; give witness.etcd'
    for url in file.witness.etcd:
        if not URL.fullmatch(url):
            yield f"witness.etcd: {shown(url)} must be {URL_ALLOWED}"
