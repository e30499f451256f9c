"""Whose layers answer otherwise than the others': the first that differs is named, by the tolerance of the coarser."""

import json
from dataclasses import replace

import pytest
from core.test_server import HELLO, SETTINGS, Bench, told_to
from core.worker_bench import WELCOME, only
from core.worker_bench import Bench as WorkerBench

from hetero_async.core.messages import INITIAL, PUBLISH, SNAPSHOT, Gone, Rejoin
from hetero_async.core.probe import (
    BATCH,
    FIGURES,
    LAYERS,
    LAYERS_MAX,
    NAME_LENGTH_MAX,
    NOTHING,
    TOLERANCES,
    Digest,
    ProbeReport,
    ProbeVerdict,
)
from hetero_async.core.prober import SAY_EVERY_MS
from hetero_async.core.probing import REASON_LENGTH_MAX, distance
from hetero_async.core.records import Left, Probed, Settings
from hetero_async.core.server import Server
from hetero_async.core.state import State
from hetero_async.core.status import summary
from hetero_async.core.trend import Trend
from hetero_async.core.worker_events import Fetched
from hetero_async.formats import frames

NAMES = ("embedding", "norm", "act", "head")


def digest(*errors: float, arithmetic: str = "fp32", kind: str = LAYERS, names: tuple[str, ...] = NAMES) -> Digest:
    """Of layers whose outputs are off by these shares of their size."""
    off = (*errors, *[0.0] * (len(names) - len(errors)))
    figures = tuple(figure for error in off for figure in (2.0, *[1.0 + 2 * error] * (FIGURES - 1)))
    return Digest(kind=kind, input="i", arithmetic=arithmetic, executed=len(names), layers=names, figures=figures)


class Probes(Bench):
    def __init__(self, **changes: object) -> None:
        super().__init__(**changes)
        self.begin("a", "b", "c")

    def probe(self, worker: str, given: Digest, reason: str = "") -> ProbeVerdict:
        incarnation = self.server.state.members[worker].incarnation
        report = ProbeReport(incarnation=incarnation, software="torch 2", digest=given, reason=reason)
        (verdict,) = told_to(worker, ProbeVerdict, self.say(worker, report))
        assert isinstance(verdict, ProbeVerdict)
        return verdict

    @property
    def references(self) -> list[tuple[str, str]]:
        return [(probed.worker, probed.digest.arithmetic) for probed in self.records(Probed)]  # type: ignore[attr-defined]

    def shown(self, worker: str) -> str:
        workers = summary(self.server, Trend(), self.now_ms)["workers"]
        return str(next(row["probe"] for row in workers if row["worker"] == worker))


def test_the_first_is_the_reference_and_who_differs_is_told_at_which_layer() -> None:
    bench = Probes()
    assert bench.shown("a") == ""
    assert bench.probe("a", digest()) == ProbeVerdict(reason="")
    assert bench.probe("b", digest(1e-5, 1e-5)) == ProbeVerdict(reason="")
    verdict = bench.probe("c", digest(0.0, 1e-5, 0.01, 0.5))
    assert not verdict.is_refused
    assert "c (site s, cpu, fp32, torch 2) does not compute what a (site s, cpu, fp32, torch 2) did" in verdict.reason
    assert "act is the first layer that differs, by 0.01 of its output's size, and 0.00012 is" in verdict.reason
    assert 'probe = "off"' in verdict.reason, "and what to do"
    assert bench.references == [("a", "fp32")]
    assert [bench.shown(worker) for worker in "abc"] == ["reference", "agrees", verdict.reason]
    assert "c" in bench.server.state.active, "it trains on"


def test_where_it_is_refused_its_samples_go_to_others_at_once() -> None:
    bench = Probes(probe="refuse")
    bench.probe("a", digest())
    bench.lease("c", 8)
    verdict = bench.probe("c", digest(0.5))
    assert verdict.is_refused
    assert bench.records(Left) == [Left(worker="c", reason=verdict.reason)]
    assert not bench.server.state.ledger.held("c")
    assert bench.probe("b", digest()) == ProbeVerdict(reason="")


def test_where_it_is_off_nothing_is_compared_and_nobody_waits_for_an_answer() -> None:
    bench = Probes(probe="off")
    assert bench.probe("a", digest()) == bench.probe("b", digest(0.5)) == ProbeVerdict(reason="")
    assert not bench.references
    assert bench.shown("b") == ""


@pytest.mark.parametrize("kind", [LAYERS, BATCH])
@pytest.mark.parametrize(("one", "other"), [("fp32", "bf16"), ("bf16", "fp32"), ("tf32", "fp32"), ("fp16", "bf16")])
def test_the_coarser_arithmetic_says_what_is_tolerated(kind: str, one: str, other: str) -> None:
    bench = Probes()
    bench.probe("a", digest(arithmetic=one, kind=kind))
    tolerated = max(TOLERANCES[one], TOLERANCES[other])
    assert "embedding" in bench.probe("b", digest(1.1 * tolerated, arithmetic=other, kind=kind)).reason
    assert bench.references == [("a", one)], "who differs is no reference"
    assert not bench.probe("c", digest(0.9 * tolerated, arithmetic=other, kind=kind)).reason
    assert bench.references == [("a", one), ("c", other)]


def test_who_computes_finely_is_held_to_who_does_as_well() -> None:
    bench = Probes()
    bench.probe("a", digest(arithmetic="bf16"))
    assert not bench.probe("b", digest(0.001)).reason
    verdict = bench.probe("c", digest(0.002))
    assert "does not compute what b" in verdict.reason


def test_through_a_model_rounding_adds_up_and_layers_by_themselves_are_all_alike() -> None:
    deep = tuple(f"layer{number}" for number in range(100))
    error = [0.0] * 99 + [5 * TOLERANCES["fp32"]]
    bench = Probes()
    bench.probe("a", digest(names=deep, kind=BATCH))
    bench.probe("a", digest(names=deep))
    assert not bench.probe("b", digest(*error, names=deep, kind=BATCH)).reason
    assert "layer99" in bench.probe("b", digest(*error, names=deep)).reason


def test_other_inputs_and_other_layers_cannot_be_compared() -> None:
    bench = Probes()
    bench.probe("a", digest(kind=BATCH))
    assert "another input" in bench.probe("b", replace(digest(kind=BATCH), input="j")).reason
    assert "no layer in common" in bench.probe("b", digest(kind=BATCH, names=("x", "y"))).reason
    assert not bench.probe("b", digest(kind=BATCH, names=("x", "norm"))).reason
    assert not bench.probe("c", replace(digest(0.5), input="j")).reason, "nobody gave its layers an input each"


def test_a_probe_that_failed_is_told_and_nothing_follows_from_it() -> None:
    bench = Probes()
    assert "a (site s, cpu, fp32, torch 2) failed: no GPU" in bench.probe("a", NOTHING, "no GPU").reason
    assert not bench.references
    assert not bench.probe("b", digest()).reason


LIES = {
    "no layer": NOTHING,
    "a kind that there is not": digest(kind="other"),
    "an arithmetic that there is not": digest(arithmetic="fp8"),
    "a figure too few": replace(digest(), figures=digest().figures[1:]),
    "more layers than ran": replace(digest(), executed=3),
    "too many layers": digest(names=tuple(map(str, range(LAYERS_MAX + 1)))),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_what_is_no_probe_is_no_reference(lie: Digest) -> None:
    bench = Probes()
    assert "cannot have come of a probe" in bench.probe("a", lie).reason
    assert not bench.server.state.references


def test_whatever_a_peer_calls_itself_the_reason_fits_into_a_message() -> None:
    bench = Probes(probe="refuse")
    long = replace(HELLO, device="d" * 256, dtype="t" * 256, life=b"other")
    for worker in ("a", "c"):
        bench.say(worker, long)
    bench.probe("a", digest())
    verdict = bench.probe("c", digest(0.5, names=("n" * 256, *NAMES)))
    assert len(verdict.reason) <= REASON_LENGTH_MAX
    frames.encode(verdict)


@pytest.mark.parametrize("off", [1e308, -1e308, 5e-324])
def test_absurd_figures_are_far_from_all_others(off: float) -> None:
    good = (1.0, 1.0, 1.0, 1.0, 1.0)
    assert distance(good, (off, -off, off, -off, off)) > 0.1
    assert distance((0.0,) * 5, (0.0,) * 5) == 0
    assert distance((0.0,) * 5, (1e-30,) * 5) > 0.1


def test_references_outlive_the_server_and_are_forgotten_at_the_operators_word() -> None:
    bench = Probes()
    bench.probe("a", digest())
    state = State.load(json.loads(json.dumps(bench.server.state.dump())))
    assert state.digest() == bench.server.state.digest()
    assert state.references["layers/fp32"].outcome == digest()
    off = Server(replace(SETTINGS, probe="off"), state)
    assert [entry.record for entry in off.ready().records] == [Settings(settings=replace(SETTINGS, probe="off"))]
    assert not off.state.references


def test_a_whole_report_fits_into_a_header() -> None:
    names = tuple(f"{number:04}".rjust(NAME_LENGTH_MAX, "x") for number in range(LAYERS_MAX))
    largest = digest(*[1 / 3] * LAYERS_MAX, names=names)
    report = ProbeReport(incarnation=1, software="torch", digest=largest)
    assert len(frames.encode(report)) < frames.HEADER_BYTES_MAX


# --- the worker's half ---


def lacking() -> WorkerBench:
    bench = WorkerBench()
    bench.worker.prober.is_lacking = True
    return bench


def test_a_worker_fetches_what_the_run_began_with_once_it_has_its_parameters() -> None:
    bench = lacking()
    bench.worker.shadow = -1
    assert bench.worker.wanted == (SNAPSHOT, bench.worker.known_publish)
    bench.worker.step(Fetched(kind=SNAPSHOT, number=0, term=0, merged_seq=0))
    assert bench.worker.wanted == (INITIAL, 0)
    bench.worker.step(Fetched(kind=INITIAL, number=0, term=0, merged_seq=0))
    assert not bench.worker.prober.is_lacking
    assert bench.worker.shadow == 0
    bench.worker.known_publish = 1
    assert bench.worker.wanted == (PUBLISH, 1)


def test_where_there_is_no_such_thing_the_worker_goes_on_without() -> None:
    bench = lacking()
    bench.worker.shadow = bench.worker.known_publish = 2
    bench.hear(Gone(kind=INITIAL, number=0))
    assert bench.worker.wanted is None


def test_a_report_is_said_until_it_is_answered_and_anew_to_every_server() -> None:
    bench = WorkerBench()
    bench.worker.prober.probed(ProbeReport(incarnation=0, software="torch", digest=digest()))
    assert [report.incarnation for report in only(bench.wait(1), ProbeReport)] == [1]
    assert not only(bench.wait(SAY_EVERY_MS - 1), ProbeReport)
    assert only(bench.wait(1), ProbeReport)
    bench.hear(ProbeVerdict(reason=""))
    assert not only(bench.wait(SAY_EVERY_MS), ProbeReport)
    bench.hear(Rejoin(incarnation=1, reason="restarted"))
    bench.hear(replace(WELCOME, attempt=1, incarnation=2))
    assert [report.incarnation for report in only(bench.wait(1), ProbeReport)] == [2]


def test_a_refusal_ends_the_worker_and_a_warning_does_not() -> None:
    bench = WorkerBench()
    bench.hear(ProbeVerdict(reason="differs"))
    assert not bench.worker.refusal
    assert bench.worker.prober.verdict == ProbeVerdict(reason="differs")
    bench.hear(ProbeVerdict(reason="differs", is_refused=True))
    assert bench.worker.refusal == "differs"
