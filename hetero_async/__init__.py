"""Train one PyTorch model on accelerators in several datacentres, asynchronously, and lose nothing."""

from hetero_async.config import RunConfig
from hetero_async.session import Session, join

__version__ = "0.1.0"

__all__ = ["RunConfig", "Session", "__version__", "join"]
