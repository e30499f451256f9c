"""Whether a delta is admitted, and if not, why: a pure function of the state and of facts about the delta.

The order of the checks is part of the answer: a delta that is already in the log is acknowledged again whatever has
become of its anchor and its ranges since.
"""

import statistics
from dataclasses import dataclass
from enum import StrEnum

from hetero_async.core import ranges
from hetero_async.core.messages import Push
from hetero_async.core.records import Delta
from hetero_async.core.state import State

# So many norms must be known before their median says what is usual.
NORMS_BEFORE_GATE = 16
# Before that, a delta may be so many times longer than the parameters themselves, or than as many ones where they are
# shorter (a model may begin at zero). No round that still trains comes near it; what would wreck the run is beyond it.
EARLY_NORM_MAX = 1000.0


class Cause(StrEnum):
    """Why a delta is refused, in the few words under which it is counted."""

    STALE = "too stale"
    AHEAD = "anchor unknown"
    LATE = "late"
    UNLEASED = "not leased"
    AWAY = "not joined"
    REPEATED = "in the log already"
    EMPTY = "no sample"
    IDLE = "steps without movement"
    REPLACED = "other bytes"
    UNREADABLE = "unreadable"
    INFINITE = "not finite"
    LONG = "too long"


# A worker that is slow, cut off or overtaken is refused for the others, and does nothing wrong.
STRIKES = frozenset(
    {Cause.EMPTY, Cause.IDLE, Cause.REPLACED, Cause.UNREADABLE, Cause.INFINITE, Cause.LONG}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class NotAdmitted:
    reason: str
    cause: Cause


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the core may know about a payload: its L2 norm, and why it cannot be used at all.

    `scale`: the norm of the parameters, or of as many ones if that is larger; 0 where nobody has seen the payload.
    """

    norm: float = 0.0
    scale: float = 0.0
    refusal: NotAdmitted | None = None


@dataclass(frozen=True, slots=True)
class Admitted:
    anchor_version: int


@dataclass(frozen=True, slots=True)
class Duplicate:
    """Already in the log: acknowledge again, apply nothing."""

    lsn: int


def judge(state: State, worker: str, push: Push, facts: Facts) -> Admitted | Duplicate | NotAdmitted:
    """Decide on a delta from an active worker's present life."""
    member = state.members[worker]
    if push.seq == member.last_seq:
        if push.payload_hash.hex() == member.last_hash:
            return Duplicate(member.last_lsn)
        return NotAdmitted(f"delta {push.seq} was already admitted with other bytes", Cause.REPLACED)
    if push.seq < member.last_seq:
        return NotAdmitted(f"delta {push.seq} comes after delta {member.last_seq} was admitted", Cause.LATE)
    refusal = facts.refusal or _unusable(push) or _of_no_term_yet(state, push) or _too_stale(state, push)
    refusal = refusal or _out_of_range(state, push, facts) or _not_leased(state, worker, push)
    return refusal or Admitted(state.publish_versions[_anchor(state, push)])


def delta_of(worker: str, push: Push, facts: Facts, verdict: Admitted) -> Delta:
    """What is recorded of it."""
    return Delta(
        worker=worker,
        incarnation=push.incarnation,
        seq=push.seq,
        anchor_version=verdict.anchor_version,
        steps=push.steps,
        ranges=push.ranges,
        codec=push.codec,
        norm=facts.norm,
        payload_hash=push.payload_hash,
        tokens=push.tokens,
    )


def _anchor(state: State, push: Push) -> int:
    """The publish of this run that the delta is measured from, or the last one before where that is not the run's."""
    is_older = push.anchor_term < state.term
    return min(push.anchor, state.common_publish(push.anchor_term)) if is_older else push.anchor


def _unusable(push: Push) -> NotAdmitted | None:
    return None if push.ranges else NotAdmitted("it covers no sample", Cause.EMPTY)


def _of_no_term_yet(state: State, push: Push) -> NotAdmitted | None:
    """What a later server calls by that number is unknown here; another publish may have it."""
    if push.anchor_term <= state.term:
        return None
    reason = f"its anchor is of term {push.anchor_term}, and the newest is {state.term}"
    return NotAdmitted(reason, Cause.AHEAD)


def _too_stale(state: State, push: Push) -> NotAdmitted | None:
    anchor = _anchor(state, push)
    if anchor > state.publish:
        return NotAdmitted(f"its anchor is publish {anchor}, and the newest is {state.publish}", Cause.AHEAD)
    anchor_version = state.publish_versions.get(anchor)
    bound = state.staleness_bound()
    if anchor_version is None:
        return NotAdmitted(f"too stale: its anchor, publish {anchor}, is forgotten", Cause.STALE)
    if state.staleness(anchor_version) > bound:
        behind = state.staleness(anchor_version)
        return NotAdmitted(f"too stale: {behind} versions behind, {bound} allowed", Cause.STALE)
    return None


def _out_of_range(state: State, push: Push, facts: Facts) -> NotAdmitted | None:
    assert state.settings is not None
    gate, norm = state.settings.norm_gate, facts.norm
    if facts.scale and norm == 0 and push.steps:
        return NotAdmitted(f"it claims steps ({push.steps}) and moves nothing", Cause.IDLE)
    if facts.scale and norm > 0 and not push.steps:
        return NotAdmitted("it claims no step and moves the parameters", Cause.IDLE)
    if gate == 0:
        return None
    moving = [norm for norm in state.norms if norm > 0]  # rounds at a learning rate of zero say nothing
    if len(moving) < NORMS_BEFORE_GATE:
        if facts.scale and norm > EARLY_NORM_MAX * facts.scale:
            reason = f"its norm {norm:.3g} is more than {EARLY_NORM_MAX:g} times the parameters' {facts.scale:.3g}"
            return NotAdmitted(reason, Cause.LONG)
        return None
    median = statistics.median(moving)
    if norm > gate * median:
        return NotAdmitted(f"its norm {norm:.3g} is more than {gate:g} times the median {median:.3g}", Cause.LONG)
    return None


def _not_leased(state: State, worker: str, push: Push) -> NotAdmitted | None:
    missing = ranges.difference(push.ranges, state.ledger.held(worker))
    if missing:
        reason = f"positions {missing[0][0]}..{missing[0][1] - 1} are not leased to it"
        return NotAdmitted(reason, Cause.UNLEASED)
    return None
