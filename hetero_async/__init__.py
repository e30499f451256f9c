"""Train one PyTorch model on accelerators in several datacentres, asynchronously, and lose nothing."""

import importlib
from typing import TYPE_CHECKING, Any

from hetero_async.config import RunConfig

if TYPE_CHECKING:
    from hetero_async.loading import load
    from hetero_async.session import Session, join

__version__ = "0.1.0"

__all__ = ["RunConfig", "Session", "__version__", "join", "load"]

_PLACES = {"Session": "session", "join": "session", "load": "loading"}


def __getattr__(name: str) -> Any:
    """What needs torch, when it is first asked for: torch takes seconds to load, and most verbs do without."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"hetero_async.{_PLACES[name]}"), name)
