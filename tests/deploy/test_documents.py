"""Commands that documents tell somebody to type, and that units, scripts and manifests type themselves, are such as
there are: verbs, options and arguments are those of the command line. Nothing is run."""

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml  # a test reads our own file with it; the package has no use for it

from hetero_async.cli import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "deploy/README.md"])
SCRIPTS = sorted([*(ROOT / "deploy/systemd").iterdir(), *(ROOT / "deploy/slurm").iterdir(), ROOT / "deploy/in-run"])
MANIFEST, ALERTS = ROOT / "deploy/kubernetes/site.yaml", ROOT / "deploy/prometheus/alerts.yaml"
# In a block, behind a prompt, sudo or a path; or within a sentence, between backquotes.
TYPED = re.compile(r"(?:^|[\s/'])hetero-async ([a-z].*)")
WITHIN = re.compile(r"`hetero-async ([a-z][^`]*)`")
OMITTED = "…"
Refused = typer.BadParameter.__mro__[1]  # UsageError of the click that typer uses, which may be a copy of its own
COMMANDS_LEAST = 60  # where fewer are found, they are not looked for in the right way


def in_document(text: str) -> Iterator[str]:
    whole = re.sub(r"\\\n\s*", "", text)
    for number, part in enumerate(whole.split("```")):
        if number % 2:
            yield from (found[1] for line in part.splitlines() if (found := TYPED.search(line)))
        else:
            yield from (f"{found} {OMITTED}" for found in WITHIN.findall(part))  # a sentence says what it is about


def in_manifest(text: str) -> Iterator[str]:
    [pods] = [one["spec"]["template"]["spec"] for one in yaml.safe_load_all(text) if one["kind"] == "StatefulSet"]
    for container in itertools.chain(pods["initContainers"], pods["containers"]):
        if found := TYPED.search(" ".join(container["command"])):
            yield found[1]


def commands() -> list[tuple[str, str]]:
    found = [(path.name, command) for path in DOCUMENTS for command in in_document(path.read_text())]
    for path in SCRIPTS:
        found += [(path.name, typed[1]) for line in path.read_text().splitlines() if (typed := TYPED.search(line))]
    found += [(MANIFEST.name, command) for command in in_manifest(MANIFEST.read_text())]
    return [*dict.fromkeys(found)]


def parse(command: str) -> None:
    """As the command line does. Raises Refused, or KeyError for a verb that there is not."""
    words = shlex.split(command, comments=True)
    verb: Any = typer.main.get_command(app)
    while hasattr(verb, "commands"):
        verb = verb.commands[words.pop(0)]
    if OMITTED not in words:
        verb.make_context(verb.name, words)
        return
    known = {option for parameter in verb.params for option in parameter.opts}
    for word in itertools.takewhile(lambda word: word != "--", words):
        if word.startswith("--") and word not in known:
            raise Refused(word)


@pytest.mark.parametrize(("place", "command"), commands())
def test_a_command_that_is_written_somewhere_is_one_that_there_is(place: str, command: str) -> None:
    parse(command)


def test_all_that_is_written_is_looked_at() -> None:
    assert len(commands()) >= COMMANDS_LEAST
    assert {"README.md", "site.sbatch", "site.yaml", "hetero-async-site@.service"} <= {place for place, _ in commands()}


@pytest.mark.parametrize("command", ["serv --run run.toml", "serve --rum run.toml", "work … --sight a -- b", "promote"])
def test_what_there_is_not_is_found(command: str) -> None:
    with pytest.raises((Refused, KeyError)):
        parse(command)


def test_alarms_name_verbs_that_there_are() -> None:
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    named = set(re.findall(r"hetero-async ([a-z-]+)", ALERTS.read_text()))
    assert named <= verbs.keys()
    assert "status" in named
