"""What a run was like over time stays small, whatever comes, and true to what was seen."""

import json
from pathlib import Path
from typing import Any

import pytest
from watch.long_run import status_at

from hetero_async.core.records import Stepped
from hetero_async.errors import ConfigError
from hetero_async.watch.chronicle import load_history
from hetero_async.watch.histories import as_one
from hetero_async.watch.history import (
    COLUMNS_MAX,
    FIGURES,
    LANES_MAX,
    MARKS_MAX,
    STATES,
    History,
    Mark,
    Series,
)
from hetero_async.watch.looks import Looks

BEGAN = 1_790_000_000.0
DAY = 86_400


def figures(**known: float) -> dict[str, float]:
    return dict.fromkeys(FIGURES, 0.0) | {"looks": 1.0, **known}


def watched(*seconds: int, history: History | None = None, **of: Any) -> Looks:
    looks = Looks(history or History())
    for second in seconds:
        looks.look(BEGAN + second, status_at(second, **of))
    return looks


def kinds(history: History) -> list[tuple[str, str]]:
    return [(mark.kind, mark.who) for mark in history.marks]


def test_a_look_is_a_column() -> None:
    series = Series()
    series.add(100.2, figures(trained=5), [("a", "a-0", "t"), ("b", "b-0", "w")])
    assert series.shown()["slots"] == [100]
    assert series.shown()["lanes"] == {"a-0": "t", "b-0": "w"}
    assert series.sites == {"a": [[1, 0, 0, 0, 0]], "b": [[0, 0, 1, 0, 0]]}


def test_looks_within_a_column_become_one() -> None:
    series = Series(step_seconds=10)
    series.add(100, figures(trained=5, standby_lag=9), [("a", "a-0", "t")])
    series.add(109, figures(trained=7, standby_lag=1), [("a", "a-0", "w")])
    assert series.slots == [10]
    assert series.figures["trained"] == [7], "of a counter the newest"
    assert series.figures["standby_lag"] == [9], "of a lag the worst"
    assert series.figures["looks"] == [2]
    assert series.sites["a"] == [[1, 0, 1, 0, 0]]


def test_a_column_that_a_clock_set_back_would_open_joins_the_last() -> None:
    series = Series()
    series.add(100, figures(), [])
    series.add(40, figures(), [])
    assert series.slots == [100]


def test_thinning_keeps_counters_worst_lags_shares_and_deaths() -> None:
    series = Series()
    letters = "dttw" + "ssss"
    for second, letter in enumerate(letters):
        series.add(100 + second, figures(trained=second, standby_lag=second % 3), [("a", "a-0", letter)])
    series.thin()
    assert series.step_seconds == 2
    assert series.slots == [50, 51, 52, 53]
    assert series.figures["trained"] == [1, 3, 5, 7]
    assert series.figures["standby_lag"] == [1, 2, 2, 1]
    assert series.shown()["lanes"] == {"a-0": "dwss"}, "a death is seen however short it was"
    assert [sum(shares) for shares in series.sites["a"]] == [2, 2, 2, 2]


def test_a_late_worker_was_absent_before() -> None:
    series = Series()
    series.add(1, figures(), [("a", "a-0", "t")])
    series.add(2, figures(), [("a", "a-0", "t"), ("b", "b-0", "t")])
    assert series.shown()["lanes"] == {"a-0": "tt", "b-0": "-t"}
    assert series.sites["b"] == [[0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]


@pytest.mark.parametrize("days", [1, 30])
def test_a_month_takes_the_room_of_a_day(days: int) -> None:
    looks = watched(*range(0, days * DAY, days * DAY // 1500), workers=8)
    whole = looks.history.whole
    assert COLUMNS_MAX // 2 <= len(whole.slots) <= COLUMNS_MAX
    assert len(looks.history.losses["validation_loss"]) <= COLUMNS_MAX
    assert len(looks.history.model_dump_json()) < 120_000
    assert whole.figures["trained"][-1] == looks.status["trained"]
    assert looks.generation > 0


def test_what_a_site_has_carried_is_the_newest_of_each_column() -> None:
    series = Series()
    series.add(100, figures(), [])
    for second, sent in ((101, 5), (102, 7), (103, 9)):
        series.add(second, figures(), [], {"a": (sent, 10 * sent)})
    series.add(104, figures(), [])
    assert series.carried == {"a": [[0, 0], [5, 50], [7, 70], [9, 90], [9, 90]]}, "who is not heard has sent no less"
    series.thin()
    assert series.shown(1)["carried"] == {"a": [[9, 90], [9, 90]]}
    series.forget(1)
    assert series.carried == {"a": [[9, 90]]}


def test_a_site_carries_what_its_workers_do_in_all_their_lives() -> None:
    looks = watched(0, 40, workers=8)
    again = status_at(50, workers=8)
    before = [worker["bytes_up"] for worker in status_at(40, workers=8)["workers"] if worker["site"] == "office"]
    for worker in again["workers"]:
        worker["bytes_up"] = 10
    looks.look(BEGAN + 50, again)
    assert looks.recent.carried["office"][-1][0] == sum(before) + 10 * len(before)


def test_what_older_software_did_not_note_is_nothing() -> None:
    kept = json.loads(watched(0, 40).history.model_dump_json())
    del kept["whole"]["carried"], kept["whole"]["figures"]["memory_bytes"]
    history = History.model_validate_json(json.dumps(kept))
    assert history.whole.figures["memory_bytes"] == [0.0, 0.0]
    assert history.whole.carried == {}


def test_whatever_comes_it_stays_bounded() -> None:
    looks = watched(0, 20, workers=LANES_MAX + 88)
    assert len(looks.history.whole.lanes) == LANES_MAX
    seen = sum(sum(shares[-1]) for shares in looks.history.whole.sites.values())
    assert seen == LANES_MAX + 88, "its site's lane has everybody"
    for number in range(MARKS_MAX + 50):
        looks.history.mark(Mark(at=float(number), kind="left" if number % 2 else "takeover"))
        looks.history.refused({f"cause {number}": 1})
    assert len(looks.history.marks) == MARKS_MAX
    assert [mark.kind for mark in looks.history.marks].count("takeover") == (MARKS_MAX + 50) // 2, "the last to go"
    assert len(looks.history.refusals) <= 32


def test_deaths_and_takeovers_are_marked() -> None:
    looks = watched(0, 1, 2)
    looks.look(BEGAN + 3, status_at(3, dead=frozenset({"office-0"})))
    looks.look(BEGAN + 4, status_at(4, term=2, dead=frozenset({"office-0"})))
    looks.look(BEGAN + 5, status_at(5, term=2))
    assert kinds(looks.history) == [("lost", "office-0"), ("takeover", "b"), ("back", "office-0")]
    assert looks.history.whole.shown()["lanes"]["office-0"][3:5] == "dd"


def test_who_says_bye_is_not_dead() -> None:
    looks = watched(0, 1)
    looks.left("office-0", "said bye")
    looks.look(BEGAN + 2, status_at(2, dead=frozenset({"office-0"})))
    assert kinds(looks.history) == [("left", "office-0")]
    assert looks.history.whole.lanes["office-0"][-1] == "-"


def test_who_was_killed_and_is_back_before_it_was_missed_came_back() -> None:
    looks = watched(0, 1)
    again = status_at(2)
    again["workers"][0]["incarnation"] = 2
    looks.look(BEGAN + 2, again)
    assert kinds(looks.history) == [("back", "amsterdam-0")]


def test_a_server_that_is_started_again_goes_on_with_its_history() -> None:
    history = watched(0, 40, 80).history
    before = history.whole.figures["bytes_up"][-1], history.refusals
    again = status_at(100)
    again["bytes"] = {"up": 1000, "down": 1000}
    again["refusals"] = {}
    for worker in again["workers"]:  # none has joined this process of the server
        worker |= {"device": "", "bytes_up": 0, "bytes_down": 0}
    looks = Looks(History.model_validate_json(history.model_dump_json()))
    looks.look(BEGAN + 100, again)
    joined = status_at(101)
    for worker in joined["workers"]:
        worker["incarnation"] = 2
    looks.look(BEGAN + 101, joined)
    assert kinds(looks.history) == [("started", "server")], "that all join anew is no news"
    assert looks.history.whole.figures["bytes_up"][-2] == before[0] + 1000
    assert looks.history.refusals == before[1]
    assert len(looks.history.losses["validation_loss"]) == 1, "it was known before"
    assert looks.history.traffic["office-0"][0] == joined["workers"][3]["bytes_up"], "it counts on, not anew"


def test_staleness_is_counted_as_deltas_are_merged() -> None:
    looks = watched(0)
    for lsn, anchor in ((7, 4), (8, 2)):
        looks.delta(lsn, anchor)
    looks.stepped(Stepped(version=5, deltas=(7, 8, 99), weights=(1, 1, 1), gain=1.0))
    assert looks.history.staleness == {0: 1, 2: 1}, "of one from before this life nothing is known"


def test_it_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    history = watched(*range(0, 4000, 5)).history
    history.merged(3)
    path = tmp_path / "history.json"
    path.write_text(history.model_dump_json())
    assert load_history(path) == history


BAD = {
    "no JSON": "{",
    "another thing": '{"whole": 3}',
    "columns of two lengths": History().model_dump_json().replace('"slots":[]', '"slots":[1]'),
    "not a number": History().model_dump_json().replace('"looks":[]', '"looks":[NaN]'),
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_a_damaged_file_is_complained_of(tmp_path: Path, content: str) -> None:
    (tmp_path / "history.json").write_text(content)
    with pytest.raises(ConfigError, match=r"history\.json: is not a history .*; remove it"):
        load_history(tmp_path / "history.json")


def test_there_may_be_none(tmp_path: Path) -> None:
    assert load_history(tmp_path / "history.json") is None


def test_two_nodes_histories_become_one() -> None:
    first = watched(*range(100))
    second = Looks(History())
    for moment in range(200):
        status = status_at(moment, term=1 if moment < 110 else 2)
        if moment < 110:  # it stands by, and does not hear workers
            status["standby"] = {"name": "b", "lag": 0}
            status["bytes"] = {"up": 0, "down": 0}
            status["workers"] = [{**worker, "state": "", "device": ""} for worker in status["workers"]]
        second.look(BEGAN + moment, status)
    late = Looks(History())  # the old server, back as a standby: it hears late of what has been
    for moment in range(150, 200):
        status = status_at(moment, term=1 if moment < 152 else 2, dead=frozenset(["office-0"] if moment == 153 else []))
        status["standby"] = {"name": "server", "lag": 0}
        late.look(BEGAN + moment, status)
    assert kinds(late.history) == [("takeover", "b"), ("lost", "office-0"), ("back", "office-0")]
    joined = as_one([second.history, first.history, late.history])
    lane = "".join(joined.whole.lanes["amsterdam-0"])
    assert len(lane) == 200
    assert "u" not in lane[:100], "as the one that served saw it"
    assert set(lane[100:110]) == {"u"}, "nobody served"
    assert "u" not in lane[110:]
    assert kinds(joined) == [("takeover", "b")]
    assert len(joined.losses["validation_loss"]) == len(second.history.losses["validation_loss"])
    up = joined.whole.figures["bytes_up"]
    assert up == sorted(up)
    assert sum(map(sum, joined.whole.sites["amsterdam"])) == 200
    sent = [totals[0] for totals in joined.whole.carried["amsterdam"]]
    assert len(sent) == 200 and sent == sorted(sent)
    assert len(STATES) == len(joined.whole.sites["amsterdam"][0])


def test_what_a_site_has_carried_is_no_less_when_another_node_serves() -> None:
    first, second = History(), History()
    for second_of_run in range(4):
        serving = {"is_serving": float(second_of_run < 2)}
        first.look(BEGAN + second_of_run, figures(**serving), [], {"a": (100 + second_of_run, 0)})
        # It hears what the workers' present lives have sent, and nothing of those before.
        second.look(BEGAN + second_of_run, figures(is_serving=1 - serving["is_serving"]), [], {"a": (second_of_run, 0)})
    assert [sent for sent, _ in as_one([first, second]).whole.carried["a"]] == [100, 101, 101, 101]
