"""The worker's half of a probe: what it needs for it, what came of it, and what the server said to that.

The report may be lost on its way, so it is said until it is answered, and anew to every process of the server.
"""

from dataclasses import replace

from hetero_async.core.probe import ProbeReport, ProbeVerdict

SAY_EVERY_MS = 3_000


class Prober:
    def __init__(self) -> None:
        self.is_lacking = False  # the parameters that the run began with are to be fetched
        self.verdict: ProbeVerdict | None = None  # the newest
        self._report: ProbeReport | None = None
        self._is_answered = False
        self._said_ms = -(10**9)

    def joined(self) -> None:
        self._is_answered, self._said_ms = False, -(10**9)

    def probed(self, report: ProbeReport) -> None:
        self._report = report

    def due(self, incarnation: int, now_ms: int) -> list[ProbeReport]:
        if self._report is None or self._is_answered or now_ms - self._said_ms < SAY_EVERY_MS:
            return []
        self._said_ms = now_ms
        return [replace(self._report, incarnation=incarnation)]

    def answered(self, verdict: ProbeVerdict) -> None:
        self.verdict, self._is_answered = verdict, True
