"""Whether a worker computes what the others do: its probe against the run's references.

Called by core/server.py. The first digest of each kind and arithmetic that agrees with the references there are is a
reference itself, recorded for good: the parameters that all probe on are the ones that the run began with.
"""

import math

from hetero_async.core.members import Presence
from hetero_async.core.probe import BATCH, TOLERANCES, Digest, ProbeReport, described
from hetero_async.core.records import Probed
from hetero_async.core.state import State

# A reason must fit into a message, and names and devices are what peers say.
REASON_LENGTH_MAX = 1000
WHAT_TO_DO = (
    "look there for other code, settings, versions or kernels; where it is the reference that is wrong, start the "
    'server once with probe = "off", and it is forgotten'
)


def judged(state: State, worker: str, presence: Presence, report: ProbeReport) -> tuple[str, Probed | None]:
    """What there is to complain of ("": nothing), and what to record. The presence is told as well."""
    reason = _complaint(state, worker, presence, report)[:REASON_LENGTH_MAX]
    reference = None
    if not reason and report.digest.key not in state.references:
        reference = Probed(
            worker=worker,
            site=state.members[worker].site,
            device=presence.device,
            dtype=presence.dtype,
            software=report.software,
            digest=report.digest,
        )
    known = state.references.get(report.digest.key)
    is_reference = reference is not None or (known is not None and known.worker == worker)
    presence.probe = reason or ("reference" if is_reference else "agrees")
    return reason, reference


def _complaint(state: State, worker: str, presence: Presence, report: ProbeReport) -> str:
    digest = report.digest
    who = described(worker, state.members[worker].site, presence.device, presence.dtype, report.software)
    if report.reason:
        return f"the probe of {who} failed: {report.reason}"
    if not digest.is_sound:
        return f"{who} reports what cannot have come of a probe"
    alike = [(reference, reference.outcome) for reference in state.references.values()]
    alike = [(reference, outcome) for reference, outcome in alike if outcome.kind == digest.kind]
    # Of its own arithmetic first: it is held to the strictest.
    for reference, outcome in sorted(alike, key=lambda one: _tolerance(one[1], digest)):
        if found := _first_difference(outcome, digest):
            return f"{who} does not compute what {reference.whose} did: {found}"
    return ""


def _tolerance(reference: Digest, digest: Digest) -> float:
    """The coarser arithmetic's."""
    return max(TOLERANCES[reference.arithmetic], TOLERANCES[digest.arithmetic])


def _first_difference(reference: Digest, digest: Digest) -> str:
    if digest.input != reference.input:
        return "its probe was another input: give join the same one at every site (probe=…)"
    expected, found = reference.outputs(), digest.outputs()
    if not any(layer in found for layer in expected):
        return f"they have no layer in common: {reference.layers[0]} was first, and {digest.layers[0]} is"
    for place, layer in enumerate(reference.layers):
        # Through a model errors of rounding add up as independent ones do: in squares.
        depth = 1 + place * reference.executed // len(reference.layers) if digest.kind == BATCH else 1
        tolerated = _tolerance(reference, digest) * math.sqrt(depth)
        if layer in found and (apart := distance(expected[layer], found[layer])) > tolerated:
            return (
                f"{layer} is the first layer that differs, by {apart:.2g} of its output's size, and "
                f"{tolerated:.2g} is tolerated between {reference.arithmetic} and {digest.arithmetic}; {WHAT_TO_DO}"
            )
    return ""


def distance(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Of two outputs, relative to the larger one, as far as their figures (r, p₁ … p_K) tell.

    √(Σ (pₖ − p′ₖ)² / K) / max(r, r′) estimates ‖y − y′‖ / ‖y‖, whatever y is: D. Achlioptas, "Database-friendly random
    projections", 2003.
    """
    size = max(abs(one[0]), abs(other[0]))
    apart = math.hypot(*(a - b for a, b in zip(one[1:], other[1:], strict=True))) / math.sqrt(len(one) - 1)
    return apart / size if size > 0 else (math.inf if apart > 0 else 0.0)
