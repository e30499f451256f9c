"""What a peer's file says to the runner: which programs run on which host. Imported in every environment."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ENVIRONMENTS = Path(__file__).parents[3] / "build" / "peers"
DEVICE = "eth0"  # of every host, whose address is the host's
COORDINATOR = "coordinator"  # the fifth host; the others are named as the workers are


@dataclass(frozen=True, slots=True)
class Host:
    name: str
    address: str  # which is its hostname too


@dataclass(frozen=True, slots=True)
class Process:
    """Whatever of it ends with an error is started again a little later, as a service manager would."""

    name: str
    host: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    again: Sequence[str] = ()  # the command by which it is started again, where that is another


def program(environment: str, name: str = "python") -> str:
    """A program of one of the peers' own environments."""
    return str(ENVIRONMENTS / environment / "bin" / name)
