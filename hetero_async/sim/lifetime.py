"""Judges one life of a worker: what it trained on, what it pushed, and where its parameters stood."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hetero_async.core.messages import Push
from hetero_async.desk import Published
from hetero_async.sim.checkers import OUTBOX_MAX, Judge, positions_of
from hetero_async.sim.story import Publish
from hetero_async.tensors.buffers import Specs, without_buffers
from hetero_async.tensors.codecs import WITH_FEEDBACK, decode_payload, encode_payload
from hetero_async.tensors.feedback import DECAY

# Largest error of one value, as a share of the delta's largest value: half a step of the code, and rounding.
CODEC_ERROR = {"fp32": 0.0, "bf16": 2**-8, "int8": 0.51 / 127, "int4": 0.51 / 7, "e3m0": 0.293}
# Of a sum of two fp32 values, as a share of the larger one.
ROUNDING_ERROR = 2**-22
# A round's progress survives so many moves of the parameters, each of which rounds.
MOVES_MAX = 64


@dataclass(slots=True)
class Coded:
    """A delta of one life: as it was encoded, or found in the outbox. `seq` is 0 until it is saved."""

    codec: str
    payload: bytes
    trained: Sequence[int]
    seq: int = 0
    delta: torch.Tensor | None = None  # what its steps did; of an earlier life that is not known any more


class Life:
    """One life of a worker, as the judge saw it."""

    def __init__(self, judge: Judge, worker: str) -> None:
        self.specs: Specs = ()  # of the model's buffers
        self._judge = judge
        self._worker = worker
        self._consumed: list[int] = []  # positions of the steps since the last cut
        self._moved = torch.zeros(1)  # what those steps did to the parameters
        self._cuts: deque[tuple[list[int], torch.Tensor]] = deque()
        self._rounds = 0  # deltas of this life and those that it found in the outbox
        self._order: list[Coded] = []
        self._accepted: dict[int, bool] = {}
        self._refused: dict[int, bool] = {}
        self._aims: deque[tuple[torch.Tensor, int, list[int]]] = deque(maxlen=4)  # targets: deltas known, and missing

    def found(self, outbox: dict[int, tuple[Push, bytes]]) -> None:
        self._order = [Coded(push.codec, payload, (), seq) for seq, (push, payload) in sorted(outbox.items())]
        self._rounds = len(outbox)
        self._judge.account(self._worker).unanswered = dict.fromkeys(outbox, True)

    def stepped(self, positions: Sequence[int], moved: torch.Tensor) -> None:
        """One step on these samples has moved the parameters by −`moved`."""
        self._consumed += positions
        self._moved = self._moved + moved

    def cut(self, delta: torch.Tensor) -> None:
        """A round ends. Its delta is what its steps did, no step left out and none counted twice."""
        error, bound = (delta - self._moved).abs().max().item(), ROUNDING_ERROR * MOVES_MAX
        if not error <= bound and self._moved.isfinite().all():
            self._judge.violated("6", f"a delta of {self._worker} differs by {error:g} from what its steps did")
        self._cuts.append((self._consumed, delta.clone()))
        self._consumed, self._moved = [], torch.zeros(1)
        self._rounds += 1

    def discarded(self) -> None:
        """A round is not pushed: its delta must be one that cannot be."""
        _, delta = self._cuts.popleft()
        self._rounds -= 1
        if delta.isfinite().all():
            self._judge.violated("6", f"{self._worker} throws away a good round")

    def encoded(self, codec: str, payload: bytes) -> None:
        trained, delta = self._cuts.popleft()
        if codec in WITH_FEEDBACK and without_buffers(self.specs, payload) != encode_payload(codec, self._fed(delta)):
            self._judge.violated("6", f"a delta of {self._worker} goes without what those before it have left out")
        self._order.append(Coded(codec, payload, sorted(trained), delta=delta))
        error = (self._decoded(codec, payload, delta) - delta).abs().max().item()
        if codec not in WITH_FEEDBACK and not error <= CODEC_ERROR[codec] * delta.abs().max().item():
            self._judge.violated("6", f"a delta of {self._worker} is coded with an error of {error:g}")

    def _decoded(self, codec: str, payload: bytes, like: torch.Tensor) -> torch.Tensor:
        return decode_payload(codec, without_buffers(self.specs, payload), like.numel())

    def _fed(self, delta: torch.Tensor) -> torch.Tensor:
        """What is to be coded: βe + Δ, with e what is left of the deltas of this life that are not refused."""
        residual: torch.Tensor | None = None
        for coded in self._order:
            if coded.delta is not None and coded.seq not in self._refused:
                left_out = coded.delta - self._decoded(coded.codec, coded.payload, delta)
                residual = left_out if residual is None else torch.add(left_out, residual, alpha=DECAY)
        return delta if residual is None else torch.add(delta, residual, alpha=DECAY)

    def answered(self, seq: int, is_accepted: bool) -> None:
        """The worker has heard what became of a delta; of one whose server was lost since, the first word counts."""
        if is_accepted:
            self._accepted[seq] = True
        elif seq not in self._accepted:
            self._refused[seq] = True

    def saved(self, push: Push, payload: bytes) -> None:
        """A delta is in the outbox: from now on it may be offered."""
        account, name = self._judge.account(self._worker), f"delta {push.seq} of {self._worker}"
        if push.seq in account.acknowledged:
            self._judge.violated("1", f"{name} was acknowledged, and now the number is given to another")
        coded = next(coded for coded in self._order if coded.seq == 0)
        coded.seq = push.seq
        if coded.payload != payload:
            self._judge.violated("6", f"{name} is saved, and it is not what was encoded")
        if list(coded.trained) != list(positions_of(push.ranges)):
            self._judge.violated("2", f"{name} reports {push.ranges}, and was trained on {coded.trained}")
        account.saved[push.seq] = (push, payload)
        account.unanswered[push.seq] = True
        if len(account.unanswered) > OUTBOX_MAX:
            self._judge.violated("7", f"{self._worker} has {len(account.unanswered)} unanswered deltas")

    def dropped(self, seq: int, is_acknowledged: bool) -> None:
        account = self._judge.account(self._worker)
        account.unanswered.pop(seq, None)
        key = (self._worker, seq)
        if is_acknowledged and key not in self._judge.story.deltas and key not in self._judge.forgiven:
            self._judge.violated("1", f"delta {seq} of {self._worker} is dropped as acknowledged, and was not admitted")

    def aimed(self, publish: int, pending: Sequence[tuple[str, bytes]], target: torch.Tensor) -> None:
        """Where the parameters shall stand: θ̂ − Σ own deltas that are neither in it nor refused, to the bit."""
        aims = [self._aim(seen, pending) for seen in self._judge.story.seen_as(publish)]
        known, missing = next(
            ((known, missing) for expected, known, missing in aims if torch.equal(expected, target)), (-1, [])
        )
        if known < 0:
            self._judge.violated("6", f"{self._worker} aims elsewhere than at publish {publish} less its open deltas")
        self._aims.append((target, known, missing))

    def _aim(self, seen: Publish, pending: Sequence[tuple[str, bytes]]) -> tuple[torch.Tensor, int, list[int]]:
        """The right target, how many deltas of this life it takes account of, and which it cannot know of yet."""
        judge, worker = self._judge, self._worker
        nacked, let_go = judge.account(worker).nacked, judge.story.merged_in_vain(worker)
        merged = seen.merged.get(worker, 0)
        open_ = [coded for coded in self._order if coded.seq == 0 or coded.seq > merged]
        left = deque(payload for _, payload in reversed(pending))
        known: list[Coded] = []
        missing: list[int] = []
        for coded in reversed(open_):
            if left and coded.payload == left[0]:
                left.popleft()
                known.insert(0, coded)
            elif not (0 < coded.seq <= let_go or coded.seq in nacked or (worker, coded.seq) in judge.forgiven):
                missing.append(coded.seq)  # it came while this was computed: the target is not for adoption
        expected = seen.shadow.clone()
        for coded in known:
            expected.sub_(self._decoded(coded.codec, coded.payload, expected))
        return expected, -1 if left else len(self._order) - len(missing), missing

    def measures(self, asked: Published) -> None:
        """What it measures was published under that number, to the bit."""
        shown = asked.flat
        assert isinstance(shown, torch.Tensor)
        if not any(torch.equal(seen.shadow, shown) for seen in self._judge.story.seen_as(asked.anchor.publish)):
            self._judge.violated("6", f"{self._worker} measures something else than publish {asked.anchor.publish}")

    def began(self, target: torch.Tensor) -> None:
        """The parameters stand on a target, with no progress."""
        _, known, missing = next((aim for aim in self._aims if aim[0] is target), (target, -1, []))
        if known != self._rounds:
            self._judge.violated(
                "6", f"{self._worker} moves to a target that lacks its deltas {missing or 'of this round'}"
            )

    def began_again(self, target: torch.Tensor) -> None:
        """The parameters stand on a target; what the round did before is gone, and must have been of no use."""
        self.began(target)
        if self._consumed and self._moved.isfinite().all():
            self._judge.violated("6", f"{self._worker} throws away the progress of {len(self._consumed)} samples")
        self._consumed, self._moved = [], torch.zeros(1)

    def adopted(self, target: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> None:
        """The parameters moved; `before` and `after` are the round's progress."""
        self.began(target)
        bound = ROUNDING_ERROR * max(1.0, target.abs().max().item())
        if not (after - before).abs().max().item() <= bound and before.isfinite().all():
            self._judge.violated("6", f"{self._worker} loses progress when it moves")
