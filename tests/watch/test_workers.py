"""The workers' table: who works, what holds the others up, and what is left out where there is no room."""

import io
import re
from typing import Any

import pytest
from rich.console import Console
from watch.statuses import away, waiting, worker

from hetero_async.watch.workers import Workers, by_site, held_up_by, worst_first


def drawn(workers: list[dict[str, Any]], width: int = 80, lines: int = 40) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width).print(Workers(workers=workers, lines=lines))
    return file.getvalue().splitlines()


def row(workers: list[dict[str, Any]], name: str, width: int = 80) -> list[str]:
    [found] = [line for line in drawn(workers, width) if line.startswith(f"{name} ")]
    return re.split("  +", found.strip())


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (worker(), ""),
        (waiting(answer=0.3, link=0.9), "slow link"),
        (waiting(answer=0.3, link=0.2), "slow server"),
        (waiting(samples=0.3, answer=0.1, link=0.9), "no samples"),
        (waiting(answer=0.05, link=1.0), ""),
        (worker(shares=None), ""),
        (away(), ""),
    ],
)
def test_what_holds_a_worker_up_follows_from_its_shares(row: dict[str, Any], expected: str) -> None:
    assert held_up_by(row) == expected


def test_each_worker_is_one_row() -> None:
    told = [worker(refused=3), waiting(answer=0.31, link=0.97, worker="b-0"), away(worker="c-0")]
    assert row(told, "amsterdam-0") == ["amsterdam-0", "training", "97%", "3%", "40%", "83 ms", "31.4", "3"]
    assert row(told, "b-0")[1:5] == ["training, slow link", "69%", "31%", "97%"]
    assert row(told, "c-0") == ["c-0", "away, silent 41 s", "–", "–", "–", "–", "0", "0"]


def test_a_wider_screen_shows_more() -> None:
    titles = {width: drawn([worker()], width)[1].split() for width in (80, 109, 110, 149, 150)}
    assert titles[80] == titles[109] == ["worker", "state", "trains", "waits", "link", "trip", "steps/s", "refused"]
    assert {"up", "down", "H", "dtype"} == set(titles[110]) - set(titles[80])
    assert {"site", "device", "stale", "samples"} == set(titles[150]) - set(titles[149])
    assert "6.2 MB/s" in drawn([worker()], 110)[2] and "11.9 MB/s" in drawn([worker()], 110)[2]


@pytest.mark.parametrize("width", [80, 110, 150])
def test_a_long_state_gives_way_to_the_figures(width: int) -> None:
    told = [worker(state="waiting for the server to come back, since 3 minutes and more than that")]
    line = drawn(told, width)[2]
    assert len(line) <= width and line.endswith("0") and "waiting" in line and "83 ms" in line


def test_rows_stand_by_site_and_number_while_there_is_room() -> None:
    names = [f"{site}-{number}" for site in ("b", "a") for number in (0, 10, 9)]
    told = [worker(worker=name, site=name[0]) for name in names]
    assert [line.split()[0] for line in drawn(told)[2:]] == ["a-0", "a-9", "a-10", "b-0", "b-9", "b-10"]


def test_the_worst_come_first_and_those_without_trouble_by_name() -> None:
    told = [
        worker(worker="calm-10"), worker(worker="calm-9", shares=None),
        waiting(answer=0.2, worker="waits"), waiting(answer=0.4, worker="waits-more"),
        away(worker="gone"), worker(worker="silent", seconds_since_heard=7.0),
    ]  # fmt: skip
    order = [row["worker"] for row in worst_first(told)]
    assert order == ["silent", "gone", "waits-more", "waits", "calm-9", "calm-10"]


def many() -> list[dict[str, Any]]:
    told = [worker(worker=f"{site}-{n}", site=site) for site in ("amsterdam", "office", "shanghai") for n in range(70)]
    told[140 + 33] = waiting(answer=0.4, link=0.9, worker="shanghai-33", site="shanghai")
    told[70 + 5] = away(worker="office-5", site="office")
    told[70 + 6] = worker(worker="office-6", site="office", seconds_since_heard=9.0, refused=4)
    return told


def test_two_hundred_workers_are_a_row_a_site_and_the_worst_of_them() -> None:
    lines = drawn(many(), lines=20)
    assert len(lines) <= 20 and all(len(line) <= 80 for line in lines)
    rows = {line.split()[0]: re.split("  +", line.strip()) for line in lines if line}
    assert rows["office"][1:3] == ["69 of 70", "1 silent"] and rows["office"][-1] == "4"
    assert rows["shanghai"][1:3] == ["70 of 70", "1 slow link"]
    assert [line.split()[0] for line in lines[2:5]] == ["office", "shanghai", "amsterdam"], "the worst site first"
    listed = [line.split()[0] for line in lines if re.match(r"\w+-\d+ ", line)]
    assert listed[:3] == ["office-6", "office-5", "shanghai-33"]
    assert lines[-1] == f"and {210 - len(listed)} more workers, which fare better; --json has all"


def test_of_many_sites_those_that_fare_better_are_counted() -> None:
    told = [worker(worker=f"s{n}-0", site=f"s{n}") for n in range(60)]
    told[44] = away(worker="s44-0", site="s44")
    lines = drawn(told, lines=24)
    assert lines[2].startswith("s44 ") and len(lines) <= 25
    assert "and 52 more sites, which fare better" in lines


def test_a_site_is_as_bad_as_its_share_of_workers_in_trouble() -> None:
    sites = by_site([away(site="b"), worker(site="b"), away(site="a"), worker(site="a"), worker(site="a")])
    assert [site.name for site in sites] == ["b", "a"]


def test_a_worker_that_lies_does_not_push_the_others_off_the_screen() -> None:
    lines = drawn([worker(steps_per_second=1e308, state="x" * 256), worker(worker="honest-1")], 110)
    assert all(len(line) <= 110 for line in lines) and len(lines) == 4
    assert any(line.startswith("honest-1") for line in lines)


def test_no_workers_are_no_table() -> None:
    assert drawn([]) == []
