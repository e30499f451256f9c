"""The status table, drawn as text."""

import io
import re
from typing import Any

import pytest
from rich.console import Console

from hetero_async.watch.status import Rate, render


def worker(**changes: Any) -> dict[str, Any]:
    usual = {
        "site": "amsterdam",
        "worker": "amsterdam-0",
        "device": "cpu",
        "dtype": "bf16",
        "state": "training",
        "incarnation": 1,
        "alive": True,
        "steps": 900,
        "steps_per_second": 31.4159,
        "steps_per_round": 32,
        "staleness": 0,
        "bytes_up": 12_345_678,
        "bytes_down": 987_654,
        "samples": 14_400,
        "deltas": 28,
        "refused": 0,
        "seconds_since_heard": 0.3,
    }
    assert changes.keys() <= usual.keys()
    return {**usual, **changes}


def status(**changes: Any) -> dict[str, Any]:
    usual = {
        "run": "byte-gpt",
        "state": "training",
        "term": 1,
        "server": "server",
        "version": 57,
        "publish": 56,
        "trained": 50_000,
        "positions": 200_000,
        "samples_per_second": 1234.5,
        "eta_seconds": 121.5,
        "deltas": {"acknowledged": 101, "refused": 2, "pending": 1},
        "refusals": {"too stale": 2},
        "metrics": {"validation_loss": {"value": 2.0417, "version": 55}},
        "bytes": {"up": 1, "down": 2},
        "log": {"lsn": 400},
        "state_hash": "ab",
        "workers": [
            worker(),
            worker(worker="amsterdam-1", dtype="fp32", staleness=3),
            worker(site="office", worker="office-0", state="away", alive=False, refused=2, seconds_since_heard=41),
        ],
    }
    return {**usual, **changes}


def drawn(status: dict[str, Any], width: int = 120, color: bool = False) -> str:
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=color, color_system="standard" if color else None).print(
        render(status)
    )
    return file.getvalue()


def test_the_run_is_summed_up_above_its_workers() -> None:
    text = drawn(status())
    for part in [
        "byte-gpt  training  version 57  publish 56  term 1  validation loss 2.042",
        "25.0%",
        "50,000 / 200,000",
        "1,234 samples/s",
        "2 m 02 s left",
        "101 acknowledged, 1 pending, 2 refused (too stale 2)",
    ]:
        assert part in text


def test_each_worker_is_one_row() -> None:
    rows = {line.split()[1]: line.split() for line in drawn(status()).splitlines() if "-0" in line or "-1" in line}
    assert rows["amsterdam-0"] == [
        *("amsterdam", "amsterdam-0", "cpu", "bf16", "training", "31.4", "32", "0"),
        *("12.3", "MB", "987.7", "kB", "14,400", "0"),
    ]
    assert rows["amsterdam-1"][7] == "3"
    assert rows["office-0"][4:8] == ["away,", "silent", "41", "s"]


@pytest.mark.parametrize("width", [80, 109, 110, 200])
def test_nothing_important_is_cut_off(width: int) -> None:
    lines = drawn(status(), width).splitlines()
    header = next(line for line in lines if "steps/s" in line)
    assert all(len(line) <= width for line in lines)
    assert header.split()[-1] == ("samples" if width < 110 else "refused")
    for word in ("amsterdam-0", "amsterdam-1", "office-0", "bf16", "fp32", "training", "away", "12.3 MB", "14,400"):
        assert word in "\n".join(lines)


def test_a_long_state_gives_way_to_the_figures() -> None:
    text = drawn(status(workers=[worker(state="waiting for the server to come back, since 3 minutes")]), 80)
    row = next(line for line in text.splitlines() if "amsterdam-0" in line)
    assert "waiting" in row
    assert "12.3 MB" in row
    assert "14,400" in row


def test_a_run_that_has_not_begun_is_drawn_too() -> None:
    empty = status(positions=0, trained=0, metrics={}, workers=[], refusals={}, state="waiting for workers")
    del empty["samples_per_second"], empty["eta_seconds"]
    text = drawn(empty)
    assert "waiting for workers" in text
    assert "0 / 0" in text
    assert "validation loss" not in text


def test_what_peers_wrote_is_neither_markup_nor_control_sequence() -> None:
    text = drawn(status(workers=[worker(state="[red]x\x1b[2J\n")]), 140, color=True)
    assert "[red]x?[2J?" in text
    assert "\x1b[2J" not in text


def test_a_paused_run_is_red() -> None:
    assert "\x1b[1;31mpaused: disk full" in drawn(status(state="paused: disk full"), color=True)


def test_how_far_the_archive_is_and_what_is_wrong_with_it() -> None:
    archive = {"lsn": 120, "checkpoint": 130, "seconds_behind": 75.0, "failing": "", "alarm": ""}
    text = drawn(status(archive=archive), 160)
    assert "archive: records up to 120, checkpoint of record 130, all that was due 1 m 15 s ago" in text
    assert "the log only grows" not in text
    for what in ("failing", "alarm"):
        text = drawn(status(archive={**archive, what: "no such bucket\x1b[2J"}), 200)
        assert "no such bucket?[2J; until it is well, the log only grows" in text
    assert "archive" not in drawn(status())


def test_speed_is_measured_between_looks() -> None:
    rate = Rate()
    first = rate.added_to({"trained": 100, "positions": 1000}, 10.0)
    assert (first["samples_per_second"], first["eta_seconds"]) == (0.0, None)
    second = rate.added_to({"trained": 200, "positions": 1000}, 12.0)
    assert (second["samples_per_second"], second["eta_seconds"]) == (50.0, 16.0)


def test_old_looks_no_longer_count() -> None:
    rate = Rate()
    for second in range(100):
        shown = rate.added_to({"trained": min(second, 60) * 10, "positions": 1000}, float(second))
    assert shown["samples_per_second"] == 0.0


def test_the_server_is_named_with_its_standbys_and_how_far_behind_they_are() -> None:
    assert "server: server\n" in re.sub(" +\n", "\n", drawn(status()))
    standbys = [
        {"standby": "b", "lag": 0, "in_reach": True, "seconds_since_heard": 0.2},
        {"standby": "c", "lag": 17, "in_reach": True, "seconds_since_heard": 0.4},
        {"standby": "server", "lag": 90, "in_reach": False, "seconds_since_heard": 41.0},
    ]
    text = drawn(status(term=2, server="a", durability="replicated", partner="b", standbys=standbys))
    assert "term 2" in text
    assert (
        "server: a, replicated; standby b (partner): level; standby c: 17 records behind; "
        "standby server: silent 41 s" in text
    )


def test_a_standby_that_answers_says_that_it_is_one() -> None:
    standby = {"name": "b", "server": "server", "lag": 3, "is_partner": True, "hears_server": True}
    text = drawn(status(state="standing by for server, 3 records behind", standby=standby))
    assert "standing by for server, 3 records behind" in text and "server: server; told by standby b" in text


def test_a_key_in_quarantine_is_one_line_with_its_reason_and_what_ends_it() -> None:
    line = {"key": "K" * 40, "worker": "office-0", "reason": "10 times refused, at last: not finite\x1b[2J"}
    text = drawn(status(quarantine=[line]), width=200)
    [told] = [row.strip() for row in text.splitlines() if "quarantined" in row]
    assert told == (
        "quarantined: office-0: 10 times refused, at last: not finite?[2J; "
        f"when it is mended: hetero-async keys lift '{'K' * 40}'"
    )
    assert "quarantined" not in drawn(status(quarantine=[]))


def test_figures_are_shown_with_the_version_that_they_were_measured_on() -> None:
    best = {"worker": "a", "version": 40, "name": "validation_loss", "value": 2.01}
    evaluation = {"worker": "amsterdam-1", "version": 57, "name": "", "value": 0.0}
    line = (
        "validation_loss 2.042 (version 55), best validation_loss 2.01 (version 40), amsterdam-1 evaluates version 57"
    )
    assert f"figures: {line}" in drawn(status(best=best, evaluation=evaluation), width=200)
    assert "figures:" not in drawn(status(metrics={}))
