"""Who serves in which term, as the witness remembers it: the one fact that two servers may not disagree about.

A term is a server's reign. Whoever wants to begin one changes this fact at the witness in a single transaction, and
only from what it was last seen to be; so of two that try, one fails. ports.Witness keeps it, core/standby.py and
core/replication.py decide by it.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Reign:
    """`partner` is the standby whose confirmations count: it has all that was acknowledged. "": nobody has."""

    term: int
    server: str
    partner: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """What the witness said when it was last asked. `holder` serves now, as far as its lease tells; "": nobody."""

    reign: Reign | None
    holder: str = ""
