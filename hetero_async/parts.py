"""What a node lives on: its settings and its ports, put together once by assembly.py, or by the simulator.

serve.py and standby.py are given it, node.py passes it from the one to the other.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from hetero_async.archiving import Archiving
from hetero_async.best import BestKeeper
from hetero_async.core.evaluating import KeepBest
from hetero_async.core.records import RunSettings
from hetero_async.core.replication import Durability
from hetero_async.core.state import State
from hetero_async.ports import Blocking, KeptLog, Model, Observer, Peer, Promises, ServerLink, Store, Witness
from hetero_async.quarantine import Quarantine
from hetero_async.reigning import Ask


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a node lives on."""

    name: str
    secret: bytes  # of this node alone, and the same in all its processes
    software: str
    settings: RunSettings
    rules: Durability
    checkpoint_every: int
    keep_log: bool
    log: KeptLog
    store: Store
    promises: Promises
    make_model: Callable[[], Model]
    listening: ServerLink
    blocking: Blocking
    observer: Observer
    witness: Witness | None
    ask: Ask
    quarantine: Quarantine
    told: Callable[[Peer], Mapping[str, object]]  # what that peer's SettingsRequest is answered with, JSON-able
    check: Callable[[State], None]  # whether the run in the log is the one that was asked for; raises ConfigError
    archiving: Archiving | None = None
    # A standby's: takes over from the server, by its SettingsReport, who is let in. None: it does not ask.
    adopt_list: Callable[[bytes], None] | None = None
    keep_best: KeepBest = field(default_factory=KeepBest)
    best: BestKeeper | None = None

    @property
    def lease_seconds(self) -> float:
        return self.rules.lease_ms / 1000
