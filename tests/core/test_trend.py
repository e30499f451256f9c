"""Curves that keep their shape in bounded room, and a rate that follows the last minutes."""

import itertools

from hetero_async.core.records import Delta, Entry, Metric
from hetero_async.core.trend import CURVE_POINTS_MAX, Curve, Trend


def metric(value: float, version: int = 1, name: str = "validation_loss") -> Entry:
    return Entry(lsn=1, term=1, record=Metric(worker="a-0", name=name, value=value, version=version))


def delta(samples: int) -> Entry:
    record = Delta(
        worker="a-0", incarnation=1, seq=1, anchor_version=0, steps=1, ranges=((0, samples),), codec="int8", norm=1.0,
        payload_hash=b"",
    )  # fmt: skip
    return Entry(lsn=1, term=1, record=record)


def test_a_curve_is_all_that_was_measured_with_its_extremes() -> None:
    trend = Trend()
    for version, value in enumerate([3.0, 1.0, 2.0]):
        trend.see(metric(value, version))
    trend.see(metric(0.5, 9, name="accuracy"))
    curve = trend.curves["validation_loss"]
    assert curve.points == [(0, 3.0), (1, 1.0), (2, 2.0)]
    assert (curve.lowest, curve.highest) == ((1, 1.0), (0, 3.0))
    assert trend.curves["accuracy"].points == [(9, 0.5)]


def test_a_long_curve_keeps_its_span_its_order_and_its_newest_value() -> None:
    for length in (CURVE_POINTS_MAX, CURVE_POINTS_MAX + 1, 1000, 12_345):
        curve = Curve()
        for version in range(length):
            curve.add(version, -float(version))
            assert curve.points[-1] == (version, -float(version))
        versions = [version for version, _ in curve.points]
        assert versions == sorted(set(versions))
        assert CURVE_POINTS_MAX // 2 <= len(versions) <= CURVE_POINTS_MAX
        each = versions[1] - versions[0]
        assert all((version + 1) % each == 0 for version in versions[:-1]), "each shows the newest it stands for"
        gaps = [after - before for before, after in itertools.pairwise(versions)]
        assert max(gaps) <= 2 * length / CURVE_POINTS_MAX + 1 and versions[0] <= max(gaps), "evenly, from the beginning"
        assert curve.highest == (0, 0.0) and curve.lowest == (length - 1, 1.0 - length)


def test_the_rate_is_that_of_the_last_minutes() -> None:
    trend = Trend()
    assert trend.samples_per_second(5_000) == 0
    for second in range(600):
        trend.see(delta(100 if second < 300 else 10), 1000 * second)
    assert trend.samples_per_second(599_000) == 10
    assert trend.samples_per_second(1_199_000) < 3, "it falls while nothing comes in"


def test_long_rounds_are_no_reason_for_a_rate_of_nothing() -> None:
    trend = Trend()
    for number in range(20):
        trend.see(delta(6_000), 600_000 * number)
    assert 9 < trend.samples_per_second(600_000 * 19 + 300_000) < 10.5


def test_many_deltas_a_second_take_no_more_room() -> None:
    trend = Trend()
    for number in range(100_000):
        trend.see(delta(1), 2 * number)
    assert 450 < trend.samples_per_second(200_000) < 550
    assert len(trend._looks) < 300


def test_what_a_recovery_reads_is_a_curve_and_no_speed() -> None:
    trend = Trend()
    trend.see(metric(2.0))
    trend.see(delta(1_000_000))
    trend.see(delta(10), 1_000)
    trend.see(delta(10), 3_000)
    assert trend.samples_per_second(3_000) == 5
    assert trend.curves["validation_loss"].points == [(1, 2.0)]
