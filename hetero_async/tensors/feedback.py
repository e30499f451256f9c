"""Error feedback: what a coarse codec leaves out of one push goes into the next.

With the decay of SparseLoCo (Sarfi et al. 2025, arXiv 2508.15706): a = βe + Δ is coded and sent, and e ← a − D, where D
is what the server decodes. The residual e belongs to what the server has: a push that it refuses takes its part of e
with it, as if its round had never been, since its samples are trained on again.
"""

from collections import deque
from collections.abc import Collection, Mapping

import torch

from hetero_async.tensors.codecs import decode_payload, encode_payload

DECAY = 0.95


RESIDUAL, LEFT_OUT = "residual", "left out/"


class ErrorFeedback:
    """Of one worker. Holds a vector for each push without an answer."""

    def __init__(self) -> None:
        self._residual: torch.Tensor | None = None  # after all pushes up to the first without an answer
        self._left_out: dict[int, torch.Tensor] = {}  # by seq, of the others: Δ − D, so that e ← βe + (Δ − D)
        self._newest: torch.Tensor | None = None  # the same, of what has no number yet
        self._accepted: dict[int, bool] = {}  # of those, in any order
        self._answers: deque[tuple[int, bool]] = deque()

    def encode(self, delta: torch.Tensor, codec: str) -> bytes:
        """The payload of the next push. `delta`: flat fp32, any device."""
        self._settle()
        own, residual = delta.cpu(), self._residual
        for left_out in self._left_out.values():
            residual = _fed(residual, left_out)
        payload = encode_payload(codec, _fed(residual, own).to(delta.device))
        self._newest = own - decode_payload(codec, payload, own.numel())
        return payload

    def pushed(self, seq: int) -> None:
        """What was encoded last has its number. Not to be called while something is being encoded."""
        if self._newest is not None:
            self._left_out[seq], self._newest = self._newest, None

    def answered(self, seq: int, is_accepted: bool) -> None:
        """From any thread, at once: it counts from the next push on."""
        if self._left_out:  # else nobody will look at it: it was coded without feedback, or is of an earlier life
            self._answers.append((seq, is_accepted))

    def dump(self) -> dict[str, torch.Tensor]:
        """What the next life of this worker needs: to be kept before the newest push is, which is in it."""
        self._settle()
        kept = {f"{LEFT_OUT}{seq}": left_out for seq, left_out in self._left_out.items()}
        return kept if self._residual is None else {RESIDUAL: self._residual, **kept}

    def load(self, kept: Mapping[str, torch.Tensor], accepted: Collection[int], unanswered: Collection[int]) -> None:
        """Go on from what an earlier life kept. `accepted`: acknowledged since then; `unanswered`: still to be offered.

        Any other push was refused, or that life ended before it could be sent.
        """
        self._residual = kept.get(RESIDUAL)
        pushes = {int(name.removeprefix(LEFT_OUT)): left for name, left in kept.items() if name.startswith(LEFT_OUT)}
        self._left_out = {
            seq: left_out for seq, left_out in sorted(pushes.items()) if seq in accepted or seq in unanswered
        }
        self._answers.extend((seq, True) for seq in self._left_out if seq in accepted)
        self._settle()

    def _settle(self) -> None:
        while self._answers:
            seq, is_accepted = self._answers.popleft()
            if not is_accepted:
                # Where it is, the server that had acknowledged the push was lost since: the first word counts.
                if seq not in self._accepted:
                    self._left_out.pop(seq, None)
            elif seq in self._left_out:
                self._accepted[seq] = True
        while self._left_out and self._accepted.pop(first := next(iter(self._left_out)), False):
            self._residual = _fed(self._residual, self._left_out.pop(first))


def _fed(residual: torch.Tensor | None, delta: torch.Tensor) -> torch.Tensor:
    """βe + Δ."""
    return delta if residual is None else torch.add(delta, residual, alpha=DECAY)
