"""Packages that only some uses need. Each belongs to an extra, which the error names when the package is missing."""

import contextlib
from collections.abc import Iterator

from hetero_async.errors import UserError


@contextlib.contextmanager
def extra(name: str, package: str) -> Iterator[None]:
    """Around an import of `package`. Raises UserError, with the command that installs it, where there is none."""
    try:
        yield
    except ImportError as error:
        told = f"this needs {package}: pip install 'hetero-async[{name}]' ({error})"
        raise UserError(told) from error
