"""A run's status (the JSON that the server answers a StatusRequest with) as the text that Prometheus reads.

docs/metrics.md is the list of all names. They are stable: a change of one breaks somebody's alarms. Nothing is kept
between two calls; what counts here begins anew with the process that counts it, as Prometheus expects it to.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

Status = Mapping[str, Any]
Read = Callable[[Status], float]

PREFIX = "hetero_async_"
NODE_LABELS, STANDBY_LABELS, WORKER_LABELS = ["run", "node", "role"], ["standby"], ["site", "worker"]


def render(status: Mapping[str, object]) -> str:
    """Prometheus' text format, version 0.0.4. `status`: of a server or a standby."""
    registry = CollectorRegistry()
    registry.register(StatusCollector(status))
    return generate_latest(registry).decode()


class StatusCollector(Collector):
    """What one status says. Collected once: the registry asks only when the text is made."""

    def __init__(self, status: Status) -> None:
        self._status = status

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        status = self._status
        yield from _run(status)
        yield from _figures(status["metrics"])
        yield from _deltas(status)
        yield from _standbys(status)
        yield from _archive(status)
        yield from _workers(status["workers"])


def gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, what, value=value)


def counter(name: str, what: str, value: float) -> Metric:
    """Its name gets `_total` at the end."""
    return CounterMetricFamily(PREFIX + name, what, value=value)


def _run(status: Status) -> Iterator[Metric]:
    info = GaugeMetricFamily(
        PREFIX + "run_info", "Always 1; which run it is, and which node says so.", labels=NODE_LABELS
    )
    node = status["standby"]["name"] if "standby" in status else status["server"]
    info.add_metric([status["run"], node, "standby" if "standby" in status else "server"], 1)
    yield info
    yield gauge("term", "Number of the server's reign; a takeover begins the next.", status["term"])
    yield counter("outer_steps", "Outer steps of the run: its version.", status["version"])
    yield counter("publishes", "Publishes of the run.", status["publish"])
    yield counter("samples_trained", "Samples in admitted deltas.", status["trained"])
    yield gauge("samples_goal", "Samples that the run is to train on; 0 until it is known.", status["positions"])
    yield gauge("samples_per_second", "Samples trained per second over the last minutes.", status["samples_per_second"])
    if status["eta_seconds"] is not None:
        yield gauge("remaining_seconds", "Until all samples are trained, at that rate.", status["eta_seconds"])
    is_over = status["positions"] > 0 and status["trained"] >= status["positions"]
    yield gauge("finished", "1 when all samples are trained.", is_over)
    yield gauge("paused", "1 while the log cannot be written, as on a full disk.", bool(status.get("paused")))
    yield gauge("acknowledgements_held", "1 while they wait for a standby.", bool(status.get("held")))
    yield counter("log_records", "Records of the log.", status["log"]["lsn"])
    yield counter("log_records_released", "Records whose outcome may be told to workers.", status["log"]["released"])
    yield gauge("memory_peak_bytes", "The most memory that the node's process has taken.", status["memory_bytes"])
    yield gauge("disk_bytes", "Log and checkpoints on the node's disk.", status["disk_bytes"])
    network = CounterMetricFamily(PREFIX + "network_bytes", "Bytes to and from all peers.", labels=["direction"])
    ways = ("sent", "received") if "standby" in status else ("received", "sent")  # up is to the server
    for direction, way in zip(ways, ("up", "down"), strict=True):
        network.add_metric([direction], status["bytes"][way])
    yield network


def _figures(metrics: Status) -> Iterator[Metric]:
    values = GaugeMetricFamily(PREFIX + "figure", "The newest of what scripts have recorded.", labels=["name"])
    versions = GaugeMetricFamily(PREFIX + "figure_version", "The version it was measured at.", labels=["name"])
    for name, metric in sorted(metrics.items()):
        values.add_metric([name], metric["value"])
        versions.add_metric([name], metric["version"])
    yield values
    yield versions


def _deltas(status: Status) -> Iterator[Metric]:
    deltas = status["deltas"]
    yield counter("deltas_acknowledged", "Deltas that are in the log.", deltas["acknowledged"])
    yield gauge("deltas_pending", "Of these, not merged yet.", deltas["pending"])
    refused = CounterMetricFamily(PREFIX + "deltas_refused", "Deltas that were refused, by cause.", labels=["reason"])
    for reason, count in sorted(status["refusals"].items()):
        refused.add_metric([reason], count)
    yield refused
    yield gauge("quarantined_keys", "Keys that are locked out for what was sent.", len(status.get("quarantine", ())))


def _standbys(status: Status) -> Iterator[Metric]:
    lag = GaugeMetricFamily(
        PREFIX + "standby_lag_records", "Records that a standby has not confirmed.", labels=STANDBY_LABELS
    )
    reach = GaugeMetricFamily(
        PREFIX + "standby_in_reach", "1 while the server hears the standby.", labels=STANDBY_LABELS
    )
    silence = GaugeMetricFamily(PREFIX + "standby_silence_seconds", "Since it was last heard.", labels=STANDBY_LABELS)
    for standby in status.get("standbys", ()):
        lag.add_metric([standby["standby"]], standby["lag"])
        reach.add_metric([standby["standby"]], standby["in_reach"])
        silence.add_metric([standby["standby"]], standby["seconds_since_heard"])
    if "standby" in status:
        lag.add_metric([status["standby"]["name"]], status["standby"]["lag"])
        reach.add_metric([status["standby"]["name"]], status["standby"]["hears_server"])
    yield from (lag, reach, silence)


def _archive(status: Status) -> Iterator[Metric]:
    if (archive := status.get("archive")) is None:
        return
    is_failing = bool(archive["failing"] or archive["alarm"])
    yield gauge("archive_behind_seconds", "Since the archive last had all that was due.", archive["seconds_behind"])
    yield gauge("archive_failing", "1 while nothing can be put there.", is_failing)
    yield counter("archive_records", "Records of the log that are in the archive.", archive["lsn"])


# Name, what it says, and how it is read off a worker's row.
WORKER_GAUGES: tuple[tuple[str, str, Read], ...] = (
    ("worker_up", "1 while the worker takes part in the run.", lambda worker: worker["alive"]),
    ("worker_silence_seconds", "Since it was last heard.", lambda worker: worker["seconds_since_heard"]),
    ("worker_steps_per_second", "Its optimizer steps per second.", lambda worker: worker["steps_per_second"]),
    ("worker_steps_per_round", "Steps expected of it in a round (H).", lambda worker: worker["steps_per_round"]),
    ("worker_staleness_versions", "Staleness of its newest delta.", lambda worker: worker["staleness"]),
    (
        "worker_round_trip_seconds", "From a heartbeat to its answer; 0: not known.",
        lambda worker: worker["usage"]["round_trip_seconds"],
    ),
    (
        "worker_upload_bytes_per_second", "What its newest deltas came to, each until its answer; 0: not known.",
        lambda worker: worker["usage"]["upload_bytes_per_second"],
    ),
    (
        "worker_download_bytes_per_second", "What its newest publishes came to; 0: not known.",
        lambda worker: worker["usage"]["download_bytes_per_second"],
    ),
)  # fmt: skip
WORKER_COUNTERS: tuple[tuple[str, str, Read], ...] = (
    ("worker_steps", "Optimizer steps in its admitted deltas.", lambda worker: worker["steps"]),
    ("worker_samples_trained", "Samples in its admitted deltas.", lambda worker: worker["samples"]),
    ("worker_deltas_acknowledged", "Its deltas that are in the log.", lambda worker: worker["deltas"]),
    ("worker_deltas_refused", "Its deltas that were refused.", lambda worker: worker["refused"]),
    ("worker_lives", "How often it has joined.", lambda worker: worker["incarnation"]),
    ("worker_sent_bytes", "Bytes that it has sent in this life.", lambda worker: worker["bytes_up"]),
    ("worker_received_bytes", "Bytes that it has received in this life.", lambda worker: worker["bytes_down"]),
    (
        "worker_training_seconds", "Of this life, in which its loop trained.",
        lambda worker: worker["usage"]["training_seconds"],
    ),
    (
        "worker_link_busy_seconds", "Of this life, with a delta or publish under way; beside the loop's.",
        lambda worker: worker["usage"]["link_busy_seconds"],
    ),
)  # fmt: skip


def _workers(workers: Iterable[Status]) -> Iterator[Metric]:
    rows = list(workers)
    yield gauge("workers", "Workers that take part in the run.", sum(worker["alive"] for worker in rows))
    for name, what, read in WORKER_GAUGES:
        family: GaugeMetricFamily | CounterMetricFamily = GaugeMetricFamily(PREFIX + name, what, labels=WORKER_LABELS)
        for worker in rows:
            family.add_metric([worker["site"], worker["worker"]], read(worker))
        yield family
    for name, what, read in WORKER_COUNTERS:
        family = CounterMetricFamily(PREFIX + name, what, labels=WORKER_LABELS)
        for worker in rows:
            family.add_metric([worker["site"], worker["worker"]], read(worker))
        yield family
    waiting = CounterMetricFamily(
        PREFIX + "worker_waiting_seconds", "Of this life, in which its loop waited.", labels=[*WORKER_LABELS, "reason"]
    )
    for worker in rows:
        waiting.add_metric([worker["site"], worker["worker"], "answer"], worker["usage"]["answer_wait_seconds"])
        waiting.add_metric([worker["site"], worker["worker"], "samples"], worker["usage"]["sample_wait_seconds"])
    yield waiting
