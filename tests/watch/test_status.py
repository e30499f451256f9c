"""The status on one screen, drawn as text: is it learning, when will it end, what was refused, who has everything."""

import io
import re
from datetime import datetime
from typing import Any

import pytest
from rich.console import Console
from watch.statuses import figure, status, worker

from hetero_async.watch.status import render, sparkline, trend

NOON = datetime(2026, 3, 4, 12, 0)


def drawn(status: dict[str, Any], width: int = 120, color: bool = False, height: int | None = None) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=color, color_system="standard" if color else None)
    console.print(render(status, NOON), height=height)
    return file.getvalue()


def line(told: dict[str, Any], label: str, width: int = 120) -> str:
    [found] = [row for row in drawn(told, width).splitlines() if row.startswith(label)]
    return re.sub(" +", " ", found).strip()


def test_the_run_is_summed_up_above_its_workers() -> None:
    text = drawn(status())
    for part in [
        "byte-gpt  training  version 57, publish 56, term 1",
        "validation_loss 2.042",
        "25.0%",
        "50,000 / 200,000 samples",
        "101 acknowledged, 1 pending, 2 refused (too stale 2)",
    ]:
        assert part in text
    assert text.index("too stale") < text.index("amsterdam-0")


# --- is it learning? ---


def falling(start: float = 5.0) -> list[list[float]]:
    return [[version, start - 0.05 * version] for version in range(40)]


def test_a_curve_is_drawn_with_where_it_is_heading() -> None:
    seen = figure(value=3.05, version=39, curve=falling(), lowest=[38, 3.0], highest=[0, 5.0])
    told = status(metrics={"validation_loss": seen, "accuracy": figure(0.25)})
    found = re.fullmatch("learning validation_loss 3.05 (█[▁-█]{22}▁) falling", line(told, "learning"))
    assert found and found[1] == "".join(sorted(found[1], reverse=True))
    assert "at version 39; lowest 3 at version 38; accuracy 0.25" in drawn(told)


def test_the_best_figure_is_told_and_who_evaluates() -> None:
    best = {"worker": "a", "version": 40, "name": "validation_loss", "value": 2.01}
    evaluation = {"worker": "amsterdam-1", "version": 57, "name": "", "value": 0.0}
    told = drawn(status(best=best, evaluation=evaluation), 200)
    assert "at version 55; best validation_loss 2.01 (version 40); amsterdam-1 evaluates version 57" in told
    assert "best" not in drawn(status(best=None, evaluation=None))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5, 4, 3, 2, 1, 0.5, 0.4, 0.3], "falling"),
        ([1, 2, 3, 4, 5, 6, 7, 8], "rising"),
        ([5, 2, 1, 1, 1, 1, 1, 1], "level"),
        ([5, 1, 1.01, 1, 1.02, 1, 1.01, 1], "level"),
        ([2, 2, 2, 2], "level"),
        ([3, 2, 1], ""),
        ([], ""),
    ],
)
def test_a_trend_is_the_newest_quarter_against_the_one_before(values: list[float], expected: str) -> None:
    assert trend(values) == expected


@pytest.mark.parametrize(
    ("values", "expected"), [([1, 2.1, 3], "▁▅█"), ([2, 2], "▁▁"), ([3], "▁"), ([*range(1, 101), 0], "▂▃▄▄▅▆▇█▁")]
)
def test_a_sparkline_ends_with_the_newest_value(values: list[float], expected: str) -> None:
    assert sparkline(values, width=9) == expected


def test_the_fall_at_the_beginning_leaves_room_for_what_follows() -> None:
    assert sparkline([100.0, 50.0, *range(22, 0, -1)], width=24) == sparkline([22, 22, *range(22, 0, -1)], width=24)


def test_a_rising_loss_is_red_and_a_rising_accuracy_is_not() -> None:
    rising = [[version, float(version)] for version in range(8)]
    assert "\x1b[1;31mrising" in drawn(status(metrics={"loss": figure(7.0, curve=rising)}), color=True)
    text = drawn(status(metrics={"accuracy": figure(7.0, curve=rising)}), color=True)
    assert "rising" in text and "\x1b[1;31mrising" not in text


def test_a_run_that_records_nothing_is_told_how_to() -> None:
    assert 'session.record("validation_loss", …)' in line(status(metrics={}), "learning")


def test_of_many_figures_the_rest_are_counted() -> None:
    many = {f"figure_{number}": figure(float(number)) for number in range(9)}
    assert "figure_6 6; 2 more figures" in drawn(status(metrics=many))


# --- when will it end? ---


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "ends in 2 m 02 s, at 12:02, if it goes on with 1,234 samples/s"),
        ({"eta_seconds": 90_000.0}, "ends in 1 d 01 h, at 2026-03-05 13:00, if it goes on with 1,234 samples/s"),
        ({"eta_seconds": None, "samples_per_second": 0.0}, "ends not known: no samples have come in lately"),
        ({"trained": 200_000}, "ends all samples are trained"),
    ],
)
def test_the_end_is_foretold_from_the_rate(changes: dict[str, Any], expected: str) -> None:
    assert line(status(**changes), "ends") == expected


def test_a_run_that_has_not_begun_is_drawn_too() -> None:
    empty = status(
        positions=0, trained=0, metrics={}, workers=[], refusals={}, state="waiting for workers",
        samples_per_second=0.0, eta_seconds=None,
    )  # fmt: skip
    text = drawn(empty)
    assert "waiting for workers" in text
    assert "0 / 0" in text


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_is_wider_than_the_screen(width: int) -> None:
    assert all(len(row) <= width for row in drawn(status(), width).splitlines())


def test_what_peers_wrote_is_neither_markup_nor_control_sequence() -> None:
    text = drawn(status(workers=[worker(state="[red]x\x1b[2J\n")]), 140, color=True)
    assert "[red]x?[2J?" in text
    assert "\x1b[2J" not in text


def test_a_paused_run_is_red() -> None:
    assert "\x1b[1;31mpaused: disk full" in drawn(status(state="paused: disk full"), color=True)


# --- who has everything? ---


def test_how_far_the_archive_is_and_what_is_wrong_with_it() -> None:
    archive = {"lsn": 120, "checkpoint": 130, "seconds_behind": 75.0, "failing": "", "alarm": ""}
    text = drawn(status(archive=archive), 160)
    assert "records up to 120, checkpoint of record 130, all that was due 1 m 15 s ago" in text
    assert "the log only grows" not in text
    for what in ("failing", "alarm"):
        text = drawn(status(archive={**archive, what: "no such bucket\x1b[2J"}), 200)
        assert "no such bucket?[2J; until it is well, the log only grows" in text
    assert "archive" not in drawn(status())


def test_the_server_is_named_with_its_standbys_and_how_far_behind_they_are() -> None:
    assert line(status(), "server") == "server server"
    standbys = [
        {"standby": "b", "lag": 2, "in_reach": True, "seconds_since_heard": 0.2},
        {"standby": "c", "lag": 170, "in_reach": True, "seconds_since_heard": 0.4},
        {"standby": "server", "lag": 90, "in_reach": False, "seconds_since_heard": 41.0},
    ]
    told = status(term=2, server="a", durability="replicated", partner="b", standbys=standbys)
    assert line(told, "server", 160) == (
        "server a, replicated; standby b (partner): in step; standby c: 170 records behind; standby server: silent 41 s"
    )


def test_a_standby_that_answers_says_that_it_is_one() -> None:
    standby = {"name": "b", "server": "server", "lag": 3, "is_partner": True, "hears_server": True}
    told = status(state="standing by for server, 3 records behind", standby=standby)
    assert "standing by for server, 3 records behind" in drawn(told)
    assert line(told, "server") == "server server; told by standby b"


def test_a_key_in_quarantine_is_one_line_with_its_reason_and_what_ends_it() -> None:
    locked = {"key": "K" * 40, "worker": "office-0", "reason": "10 times refused, at last: not finite\x1b[2J"}
    assert line(status(quarantine=[locked]), "locked out", 200) == (
        "locked out office-0: 10 times refused, at last: not finite?[2J; "
        f"when it is mended: hetero-async keys lift '{'K' * 40}'"
    )
    assert "locked out" not in drawn(status(quarantine=[]))


def test_who_computes_something_else_is_told_and_of_many_some() -> None:
    differs = [worker(worker=f"office-{number}", probe=f"office-{number} does not\x1b[2J") for number in range(7)]
    assert line(status(workers=[worker(probe="reference"), *differs[:1]]), "probe") == "probe office-0 does not?[2J"
    text = drawn(status(workers=[worker(), *differs]))
    assert [word in text for word in ("office-4 does", "office-5 does", "2 more workers")] == [True, False, True]
    assert "probe" not in drawn(status())


# --- what is left of it ---


def test_of_a_run_that_nobody_serves_the_disk_is_told() -> None:
    remains = {"directory": "/runs/my-run", "lsn": 400, "checkpoint": 380, "written": "2026-03-04 11:00:00+00:00"}
    notes = [
        {"worker": f"office-{n}", "kind": "too stale: …", "count": 9 - n, "last": "too stale: 7 versions"}
        for n in range(7)
    ]
    told = status(state="not running", remains={**remains, "damage": ""}, refusal_notes=notes, metrics={})
    text = drawn(told)
    assert text.startswith("no server is running; this is what /runs/my-run holds:")
    assert "log up to record 400, last written 2026-03-04 11:00:00+00:00; checkpoint of record 380" in text
    assert "office-0: 9 times, at last: too stale: 7 versions" in text
    assert "office-5" not in text and "2 more kinds: hetero-async audit shows them" in text
    hurt = status(remains={**remains, "damage": "1.log: offset 99: fails its checksum"})
    assert "fails its checksum" in drawn(hurt, 200)
