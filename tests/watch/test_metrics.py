"""What Prometheus is told: parsed back as it parses it, held against the list of names and the rules for alarms."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml  # a test reads our own file with it; the package has no use for it
from prometheus_client.parser import text_string_to_metric_families
from watch.statuses import status, worker

from hetero_async.watch.metrics import render

ROOT = Path(__file__).parent.parent.parent
ARCHIVE = {"lsn": 120, "checkpoint": 130, "seconds_behind": 75.0, "failing": "", "alarm": ""}
STANDBYS = [
    {"standby": "b", "lag": 0, "in_reach": True, "seconds_since_heard": 0.2},
    {"standby": "c", "lag": 17, "in_reach": False, "seconds_since_heard": 41.0},
]
# With all that a status can have.
FULL = status(standbys=STANDBYS, partner="b", durability="replicated", archive=ARCHIVE, quarantine=[{"key": "K"}])


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, f"{key} is told twice"
            found[key] = sample.value
    return found


def value(told: dict[str, Any], name: str, /, **labels: str) -> float:
    return samples(render(told))[f"hetero_async_{name}", frozenset(labels.items())]


def test_what_is_told_is_what_the_status_says() -> None:
    assert value(FULL, "run_info", run="byte-gpt", node="server", role="server") == 1
    assert value(FULL, "samples_trained_total") == 50_000
    assert value(FULL, "remaining_seconds") == 121.5
    assert value(FULL, "deltas_refused_total", reason="too stale") == 2
    assert value(FULL, "figure", name="validation_loss") == 2.0417
    assert value(FULL, "standby_lag_records", standby="c") == 17
    assert value(FULL, "standby_in_reach", standby="c") == 0
    assert value(FULL, "archive_behind_seconds") == 75
    assert value(FULL, "quarantined_keys") == 1
    assert value(FULL, "network_bytes_total", direction="received") == 1, "what goes up, the server receives"
    standing_by = status(standby={"name": "b", "lag": 0, "hears_server": True})
    assert value(standing_by, "network_bytes_total", direction="sent") == 1
    assert value(FULL, "workers") == 2
    who = {"site": "amsterdam", "worker": "amsterdam-0"}
    assert value(FULL, "worker_waiting_seconds_total", **who, reason="answer") == 20
    assert value(FULL, "worker_waiting_seconds_total", **who, reason="samples") == 10
    assert value(FULL, "worker_training_seconds_total", **who) == 970
    assert value(FULL, "worker_up", site="office", worker="office-0") == 0


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("paused", {"paused": "paused: no space left"}),
        ("acknowledgements_held", {"held": "acknowledgements wait: no standby is in reach"}),
        ("finished", {"trained": 200_000}),
        ("archive_failing", {"archive": {**ARCHIVE, "failing": "no such bucket"}}),
        ("archive_failing", {"archive": {**ARCHIVE, "alarm": "another run's"}}),
    ],
)
def test_what_an_alarm_looks_at_is_0_and_then_1(name: str, changes: dict[str, Any]) -> None:
    assert value(FULL, name) == 0
    assert value({**FULL, **changes}, name) == 1


def test_a_run_that_has_not_begun_and_a_standby_are_told_of_too() -> None:
    empty = status(positions=0, trained=0, metrics={}, workers=[], refusals={}, eta_seconds=None)
    assert value(empty, "finished") == value(empty, "workers") == 0
    assert not [name for name, _ in samples(render(empty)) if name.endswith(("remaining_seconds", "archive_failing"))]
    standby = {"name": "b", "server": "server", "lag": 3, "is_partner": True, "hears_server": True}
    told = status(standby=standby)
    del told["paused"], told["held"]
    assert value(told, "run_info", run="byte-gpt", node="b", role="standby") == 1
    assert value(told, "standby_lag_records", standby="b") == 3


def test_what_peers_wrote_stays_within_its_label() -> None:
    name = 'a"} 1\nhetero_async_workers 99\\'
    told = status(workers=[worker(worker=name)], metrics={name: {"value": 1.0, "version": 2}})
    assert value(told, "worker_up", site="amsterdam", worker=name) == 1
    assert value(told, "figure", name=name) == 1
    assert value(told, "workers") == 1


def test_the_list_of_names_is_what_is_exported() -> None:
    told = []
    for family in text_string_to_metric_families(render(FULL)):
        labels = sorted({label for sample in family.samples for label in sample.labels})
        name = family.samples[0].name
        told.append(f"| `{name}` | {family.type} | {', '.join(labels)} | {family.documentation} |")
    page = (ROOT / "docs/metrics.md").read_text()
    listed = [re.sub(r" +", " ", line) for line in page.splitlines() if line.startswith("| `hetero_async_")]
    assert [re.sub(r" +", " ", line) for line in told] == listed
    queries = set(re.findall(r"hetero_async_\w+", page))
    assert queries == {line.split("`")[1] for line in told}


def test_alarms_ask_for_nothing_that_is_not_exported() -> None:
    [group] = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yaml").read_text())["groups"]
    exported: dict[str, set[str]] = {}
    for name, labels in samples(render(FULL)):
        exported.setdefault(name, set()).update(label for label, _ in labels)
    for rule in group["rules"]:
        asked = set(re.findall(r"hetero_async_\w+", rule["expr"]))
        assert asked and asked <= exported.keys(), rule["alert"]
        kept = {"instance"}.union(*(exported[name] for name in asked))
        named = re.findall(r"\$labels\.(\w+)", str(rule["annotations"]))
        assert set(named) <= kept, rule["alert"]
        assert {"summary", "description"} == rule["annotations"].keys() and rule["labels"]["severity"]
    assert len({rule["alert"] for rule in group["rules"]}) == len(group["rules"])
