"""Whether a delta is admitted, and if not, why: a pure function of the state and of facts about the delta.

The order of the checks is part of the answer: a delta that is already in the log is acknowledged again whatever has
become of its anchor and its ranges since.
"""

import statistics
from dataclasses import dataclass

from hetero_async.core import ranges
from hetero_async.core.messages import Push
from hetero_async.core.state import State

# The gate opens its eyes after this many norms: a median of fewer says little about what is normal.
NORMS_BEFORE_GATE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the core may know about a payload: its L2 norm, and why it cannot be used at all ("" when it can)."""

    norm: float = 0.0
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Admitted:
    anchor_version: int


@dataclass(frozen=True, slots=True)
class Duplicate:
    """Already in the log: acknowledge again, apply nothing."""

    lsn: int


@dataclass(frozen=True, slots=True)
class NotAdmitted:
    reason: str


def judge(state: State, worker: str, push: Push, facts: Facts) -> Admitted | Duplicate | NotAdmitted:
    """Decide on a delta from an active worker's present life."""
    member = state.members[worker]
    if push.seq == member.last_seq:
        if push.payload_hash.hex() == member.last_hash:
            return Duplicate(member.last_lsn)
        return NotAdmitted(f"delta {push.seq} was already admitted with other bytes")
    if push.seq < member.last_seq:
        return NotAdmitted(f"delta {push.seq} comes after delta {member.last_seq} was admitted")
    if refusal := facts.refusal or _unusable(push) or _too_stale(state, push):
        return NotAdmitted(refusal)
    if refusal := _out_of_range(state, facts.norm) or _not_leased(state, worker, push):
        return NotAdmitted(refusal)
    return Admitted(state.publish_versions[push.anchor])


def _unusable(push: Push) -> str:
    if not push.ranges:
        return "it covers no sample"
    return ""


def _too_stale(state: State, push: Push) -> str:
    if push.anchor > state.publish:
        return f"its anchor is publish {push.anchor}, and the newest is {state.publish}"
    anchor_version = state.publish_versions.get(push.anchor)
    bound = state.staleness_bound()
    if anchor_version is None:
        return f"too stale: its anchor, publish {push.anchor}, is forgotten"
    if state.staleness(anchor_version) > bound:
        return f"too stale: {state.staleness(anchor_version)} versions behind, {bound} allowed"
    return ""


def _out_of_range(state: State, norm: float) -> str:
    assert state.settings is not None
    gate = state.settings.norm_gate
    if gate == 0 or len(state.norms) < NORMS_BEFORE_GATE:
        return ""
    median = statistics.median(state.norms)
    if norm > gate * median:
        return f"its norm {norm:.3g} is more than {gate:g} times the median {median:.3g}"
    return ""


def _not_leased(state: State, worker: str, push: Push) -> str:
    missing = ranges.difference(push.ranges, state.ledger.held(worker))
    if missing:
        return f"positions {missing[0][0]}..{missing[0][1] - 1} are not leased to it"
    return ""
