"""Draws a run's status (the JSON that the server answers a StatusRequest with) as a table for a terminal.

`hetero-async status` and the demo show it. It asks nobody and keeps nothing, but for `Rate`, which turns two looks at
the same run into a speed. What peers wrote (names, states) is shown as plain text: no markup, no control characters.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich import filesize
from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Status = Mapping[str, Any]

# Below this width only the columns that tell workers apart and show how they fare are drawn.
WIDE_COLUMNS = 110
# Speed is taken over so many seconds: long enough to span a few rounds, short enough to notice a lost site.
RATE_SECONDS = 30.0
# Heartbeats come every second; a worker that missed a few is worth a remark.
SILENT_SECONDS = 4.0
# A run may have hundreds of names; so many fit on two lines.
FIGURES_SHOWN = 8
STYLES = {"training": "green", "finished": "bold green", "paused": "bold red", "away": "red"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    title: str
    shown: Callable[[Status], str]
    is_number: bool = True
    only_wide: bool = False


COLUMNS = (
    Column(title="site", shown=lambda worker: worker["site"], is_number=False, only_wide=True),
    Column(title="worker", shown=lambda worker: worker["worker"], is_number=False),
    Column(title="device", shown=lambda worker: worker["device"], is_number=False, only_wide=True),
    Column(title="dtype", shown=lambda worker: worker["dtype"], is_number=False),
    Column(title="state", shown=lambda worker: _doing(worker), is_number=False),
    Column(title="steps/s", shown=lambda worker: f"{worker['steps_per_second']:.1f}"),
    Column(title="H", shown=lambda worker: str(worker["steps_per_round"])),
    Column(title="stale", shown=lambda worker: str(worker["staleness"])),
    Column(title="up", shown=lambda worker: filesize.decimal(worker["bytes_up"])),
    Column(title="down", shown=lambda worker: filesize.decimal(worker["bytes_down"])),
    Column(title="samples", shown=lambda worker: f"{worker['samples']:,}"),
    Column(title="refused", shown=lambda worker: str(worker["refused"]), only_wide=True),
)


def render(status: Status) -> RenderableType:
    """The whole picture: the run on top, one row a worker below."""
    archive = [_archive(status["archive"])] if "archive" in status else []
    head: list[RenderableType] = [_headline(status), _progress(status), _counts(status)]
    head += [_serving(status), *_figures(status), *_quarantine(status), *archive, ""]
    return Group(*head, Workers(workers=status["workers"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """The workers' table, with as many columns as the terminal has room for."""

    workers: list[Status]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = [column for column in COLUMNS if options.max_width >= WIDE_COLUMNS or not column.only_wide]
        table = Table(box=None, pad_edge=False, header_style="dim", expand=True)
        for column in columns:
            # The state alone gives way: the figures keep their room.
            ratio, least = (1, 10) if column.title == "state" else (None, None)
            justify: JustifyMethod = "right" if column.is_number else "left"
            table.add_column(column.title, justify=justify, ratio=ratio, min_width=least, no_wrap=True)
        for worker in self.workers:
            style = "" if worker["alive"] else "dim"
            table.add_row(*(_cell(column, worker) for column in columns), style=style)
        yield table


def _cell(column: Column, worker: Status) -> Text:
    text = plain(column.shown(worker))
    return _state(text) if column.title == "state" else Text(text)


def _doing(worker: Status) -> str:
    state, silent = str(worker["state"]), float(worker["seconds_since_heard"])
    return f"{state}, silent {_duration(silent)}" if silent >= SILENT_SECONDS else state


def _headline(status: Status) -> Text:
    loss = status["metrics"].get("validation_loss")
    line = Text.assemble((plain(status["run"]), "bold"), "  ", _state(plain(status["state"])))
    line.append(f"  version {status['version']}  publish {status['publish']}  term {status['term']}")
    if loss:
        line.append(f"  validation loss {loss['value']:.3f}", "bold")
    return line


def _progress(status: Status) -> Table:
    trained, positions = status["trained"], status["positions"]
    rate, eta = status.get("samples_per_second"), status.get("eta_seconds")
    share = f"{trained / positions:.1%}" if positions else "–"
    speed = f"{rate:,.0f} samples/s" if rate else ""
    left = f"{_duration(eta)} left" if eta is not None else ""
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(ratio=1)
    grid.add_row(
        ProgressBar(total=max(positions, 1), completed=trained), share, f"{trained:,} / {positions:,}", speed, left
    )
    return grid


def _counts(status: Status) -> Text:
    deltas = status["deltas"]
    line = Text(f"deltas: {deltas['acknowledged']} acknowledged, {deltas['pending']} pending, ")
    line.append(f"{deltas['refused']} refused", "yellow" if deltas["refused"] else "")
    if status["refusals"]:
        line.append(f" ({', '.join(f'{plain(why)} {count}' for why, count in status['refusals'].items())})", "yellow")
    return line


def _figures(status: Status) -> list[Text]:
    """What was measured, each with the version that it was measured on, and what is the best yet."""
    told = [
        f"{plain(name)} {metric['value']:.4g} (version {metric['version']})"
        for name, metric in status["metrics"].items()
    ]
    if best := status.get("best"):
        told.append(f"best {plain(best['name'])} {best['value']:.4g} (version {best['version']})")
    if evaluation := status.get("evaluation"):
        told.append(f"{plain(evaluation['worker'])} evaluates version {evaluation['version']}")
    return [Text("figures: " + ", ".join(told[-FIGURES_SHOWN:]))] if told else []


def _serving(status: Status) -> Text:
    """Who serves, and how far behind its standbys are; a standby tells what it last heard of that."""
    line = Text(f"server: {plain(status['server'] or '?')}")
    if status.get("durability") == "replicated":
        line.append(", replicated")
    for standby in status.get("standbys", []):
        is_partner = standby["standby"] == status["partner"]
        line.append(f"; standby {plain(standby['standby'])}{' (partner)' if is_partner else ''}: ")
        if standby["in_reach"]:
            line.append("level" if standby["lag"] == 0 else f"{standby['lag']} records behind")
        else:
            line.append(f"silent {_duration(standby['seconds_since_heard'])}", "red")
    if "standby" in status:
        line.append(f"; told by standby {plain(status['standby']['name'])}", "yellow")
    return line


def _archive(archive: Status) -> Text:
    line = Text(f"archive: records up to {archive['lsn']}, checkpoint of record {archive['checkpoint']}, ")
    line.append(f"all that was due {_duration(archive['seconds_behind'])} ago")
    if why := archive["alarm"] or archive["failing"]:
        line.append(f"  {plain(why)}; until it is well, the log only grows", "bold red")
    return line


def _quarantine(status: Status) -> list[Text]:
    """One line a key, with what to do."""
    return [
        Text(
            f"quarantined: {plain(line['worker'])}: {plain(line['reason'])}; "
            f"when it is mended: hetero-async keys lift '{plain(line['key'])}'",
            "red",
        )
        for line in status.get("quarantine", [])
    ]


def _state(text: str) -> Text:
    """Coloured by its first word: `paused: no space left` is as red as `paused`."""
    return Text(text, STYLES.get(text.split(":")[0].split(" ")[0], "yellow"))


def plain(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} m" if hours else f"{minutes} m {rest:02} s" if minutes else f"{rest} s"


class Rate:
    """How fast the whole run trains, from the statuses that were looked at in the last RATE_SECONDS."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, int]] = deque()

    def added_to(self, status: Status, now_seconds: float) -> dict[str, Any]:
        """The status with `samples_per_second` and `eta_seconds` (None while there is no speed)."""
        self._looks.append((now_seconds, status["trained"]))
        while len(self._looks) > 2 and self._looks[0][0] < now_seconds - RATE_SECONDS:
            self._looks.popleft()
        since, trained = self._looks[0]
        rate = (status["trained"] - trained) / (now_seconds - since) if now_seconds > since else 0.0
        left = status["positions"] - status["trained"]
        return {**status, "samples_per_second": rate, "eta_seconds": left / rate if rate > 0 else None}
