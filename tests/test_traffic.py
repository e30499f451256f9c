"""How busy a link was, and what it carried meanwhile."""

from hetero_async.traffic import DOWN, TRANSFERS_KEPT, UP, Traffic


def test_a_link_is_busy_while_anything_is_under_way_either_way() -> None:
    traffic = Traffic()
    assert traffic.usage(50.0).link_busy_seconds == 0
    traffic.begin(UP, 50.0)
    traffic.begin(UP, 51.0)  # said again
    traffic.begin(DOWN, 52.0)
    assert traffic.usage(53.0).link_busy_seconds == 3, "what goes on counts as well"
    traffic.end(UP, 54.0, 400)
    traffic.end(DOWN, 56.0, 800)
    assert traffic.usage(60.0).link_busy_seconds == 6
    traffic.begin(DOWN, 61.0)
    assert traffic.usage(61.5).link_busy_seconds == 6.5


def test_a_rate_is_of_the_newest_whole_transfers() -> None:
    traffic = Traffic()
    assert traffic.usage(0.0).upload_bytes_per_second == 0
    now = 0.0
    for size in [1_000_000, *[100] * TRANSFERS_KEPT]:
        traffic.begin(UP, now)
        now += 2.0
        traffic.end(UP, now, size)
    assert traffic.usage(now).upload_bytes_per_second == 50
    traffic.begin(UP, now)
    traffic.end(UP, now + 9.0)  # it came to nothing
    assert traffic.usage(now).upload_bytes_per_second == 50
    assert traffic.usage(now).download_bytes_per_second == 0


def test_an_end_without_a_beginning_is_nothing() -> None:
    traffic = Traffic()
    traffic.end(DOWN, 5.0, 100)
    assert (traffic.usage(6.0).link_busy_seconds, traffic.usage(6.0).download_bytes_per_second) == (0, 0)


def test_an_exchange_is_what_a_delta_and_a_publish_take_and_no_snapshot() -> None:
    traffic = Traffic()
    now = 0.0

    def carry(way: str, seconds: float) -> float:
        nonlocal now
        traffic.begin(way, now)
        now += seconds
        traffic.end(way, now, 100)
        return traffic.usage(now).exchange_seconds

    assert [carry(DOWN, 30.0), carry(UP, 6.0), carry(DOWN, 5.0), carry(UP, 4.0), carry(UP, 4.0)] == [0.0] * 5
    assert carry(DOWN, 5.0) == 9.0, "without the snapshot"
    assert [carry(UP, 60.0), carry(DOWN, 3.0)] == [9.0, 9.0], "once is an accident"
    for _ in range(TRANSFERS_KEPT):
        carry(UP, 1.0)
    assert carry(DOWN, 5.0) == 6.0
