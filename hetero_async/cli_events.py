"""The option in which form a verb that goes on for long tells of its events."""

import os
from enum import StrEnum
from typing import Annotated

import typer

from hetero_async.shell.telemetry import ENV_LOG, JSON, LINES


class LogFormat(StrEnum):
    LINES = LINES
    JSON = JSON


def _choose(chosen: LogFormat) -> LogFormat:
    """For this process, and for the workers that it starts."""
    os.environ[ENV_LOG] = chosen.value
    return chosen


LogFormatOption = Annotated[
    LogFormat,
    typer.Option(
        "--log-format", envvar=ENV_LOG, callback=_choose, help="Events on standard error: lines, or a JSON object each."
    ),
]
