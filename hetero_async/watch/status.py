"""Draws a run's status (the JSON that the server answers a StatusRequest with) on one screen.

It answers, from the top down: is it learning, when will it end, what was refused, do the standbys have everything; the
workers are workers.py's. `hetero-async status` and the demo show it. It asks nobody and keeps nothing. What peers wrote
(names, states) is shown as plain text: no markup, no control characters.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import fmean
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hetero_async.watch.words import duration, plain, speed
from hetero_async.watch.workers import Workers

Status = Mapping[str, Any]

STYLES = {"training": "green", "finished": "bold green", "paused": "bold red", "not": "bold red"}
# The figure that says whether a run learns; where a script records none of that name, any loss, then anything.
HEADLINE = "validation_loss"
OTHER_FIGURES_MAX = 6
BARS = "▁▂▃▄▅▆▇█"
SPARKLINE_WIDTH = 24
# In this part of a run every model falls from knowing nothing, and would leave the rest of its curve flat.
FALL = 12
# A curve whose newest quarter is not further from the quarter before than this share of its range is level.
LEVEL_SHARE = 0.02
TREND_POINTS_MIN = 4
# Notes of refusals that a stopped run has left: so many kinds.
NOTES_MAX = 5
GOOD_PROBES = ("", "agrees", "reference")
# So many are on their way to a standby that has no difficulty.
NEAR_RECORDS = 32
# Where it is not known how high the screen is.
HEIGHT = 60


def render(status: Status, now: datetime | None = None) -> RenderableType:
    """The whole picture. `now`: local time, for when it will end."""
    return Picture(status, now or datetime.now())


@dataclass(frozen=True, slots=True)
class Picture:
    """The run on top, and below as many workers as there is room for."""

    status: Status
    now: datetime

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        head = Group(*_remains(self.status), _headline(self.status), _facts(self.status, self.now))
        yield head
        used = len(console.render_lines(head, options.update(height=None)))
        yield Workers(workers=self.status["workers"], lines=(options.height or HEIGHT) - used)


def _headline(status: Status) -> Text:
    line = Text.assemble((plain(status["run"]), "bold"), "  ", _state(plain(status["state"])))
    line.append(f"  version {status['version']}, publish {status['publish']}, term {status['term']}", "dim")
    return line


def _facts(status: Status, now: datetime) -> Table:
    """One question a line."""
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_row("learning", _learning(status))
    if figures := _figures(status):
        grid.add_row("", figures)
    grid.add_row("trained", _progress(status))
    if "remains" not in status:
        grid.add_row("ends", _ending(status, now))
    grid.add_row("deltas", _counts(status))
    for note in _notes(status):
        grid.add_row("refused", note)
    for line in _probes(status):
        grid.add_row("probe", line)
    grid.add_row("server", _serving(status))
    if "archive" in status:
        grid.add_row("archive", _archive(status["archive"]))
    for line in _quarantine(status):
        grid.add_row("locked out", line)
    return grid


# --- is it learning? ---


def _learning(status: Status) -> Text:
    name = _headline_figure(status)
    if not name:
        return Text(f'no figure yet: let a script say session.record("{HEADLINE}", …)', "dim")
    metric = status["metrics"][name]
    line = Text.assemble((f"{plain(name)} {metric['value']:.4g}", "bold"), "  ")
    values = [value for _, value in metric.get("curve", ())]
    if len(values) > 1:
        line.append(sparkline(values), "cyan")
        line.append("  ")
    if word := trend(values):
        is_bad, is_good = (word == "rising", word == "falling") if "loss" in name else (False, False)
        line.append(word, "bold red" if is_bad else "green" if is_good else "yellow")
    return line


def _headline_figure(status: Status) -> str:
    names: list[str] = sorted(status["metrics"])
    return next(iter([*(n for n in names if n == HEADLINE), *(n for n in names if "loss" in n), *names]), "")


def _figures(status: Status) -> Text | None:
    """Of which version the figure above is, how low it has been, and what else was measured."""
    name = _headline_figure(status)
    if not name:
        return None
    metric = status["metrics"][name]
    told = [f"at version {metric['version']}"]
    if "loss" in name and (lowest := metric.get("lowest")) and lowest[1] < metric["value"]:
        told.append(f"lowest {lowest[1]:.4g} at version {lowest[0]}")
    others = [other for other in sorted(status["metrics"]) if other != name]
    told += [f"{plain(other)} {status['metrics'][other]['value']:.4g}" for other in others[:OTHER_FIGURES_MAX]]
    if len(others) > OTHER_FIGURES_MAX:
        told.append(f"{len(others) - OTHER_FIGURES_MAX} more figures")
    if best := status.get("best"):
        told.append(f"best {plain(best['name'])} {best['value']:.4g} (version {best['version']})")
    if evaluation := status.get("evaluation"):
        told.append(f"{plain(evaluation['worker'])} evaluates version {evaluation['version']}")
    return Text("; ".join(told), "dim")


def sparkline(values: Sequence[float], width: int = SPARKLINE_WIDTH) -> str:
    """The newest value is the last bar; where there are more values than bars, evenly chosen ones.

    What the first bars are above or below the others is cut off.
    """
    count = min(width, len(values))
    chosen = [values[(number + 1) * len(values) // count - 1] for number in range(count)]
    settled = chosen[count // FALL :]
    lowest, highest = min(settled), max(settled)
    if lowest == highest:
        return BARS[0] * count
    heights = [min(1.0, max(0.0, (value - lowest) / (highest - lowest))) for value in chosen]
    return "".join(BARS[round(height * (len(BARS) - 1))] for height in heights)


def trend(values: Sequence[float]) -> str:
    """falling, level or rising: how the newest quarter of a curve stands to the quarter before; "": too few to say."""
    if len(values) < TREND_POINTS_MIN:
        return ""
    quarter = len(values) // 4
    change = fmean(values[-quarter:]) - fmean(values[-2 * quarter : -quarter])
    if abs(change) <= LEVEL_SHARE * (max(values) - min(values)):
        return "level"
    return "rising" if change > 0 else "falling"


# --- when will it end? ---


def _progress(status: Status) -> Table:
    trained, positions = status["trained"], status["positions"]
    share = f"{trained / positions:.1%}" if positions else "–"
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(ratio=1)
    grid.add_row(
        ProgressBar(total=max(positions, 1), completed=trained, complete_style="cyan", finished_style="green"),
        share,
        f"{trained:,} / {positions:,} samples",
    )
    return grid


def _ending(status: Status, now: datetime) -> Text:
    rate, left = status["samples_per_second"], status["eta_seconds"]
    if status["positions"] and status["trained"] >= status["positions"]:
        return Text("all samples are trained", "green")
    if left is None:
        return Text("not known: no samples have come in lately", "yellow")
    end = now + timedelta(seconds=left)
    at = f"{end:%H:%M}" if end.date() == now.date() else f"{end:%Y-%m-%d %H:%M}"
    return Text(f"in {duration(left)}, at {at}, if it goes on with {speed(rate)} samples/s")


# --- what was refused? ---


def _counts(status: Status) -> Text:
    deltas = status["deltas"]
    line = Text(f"{deltas['acknowledged']} acknowledged, {deltas['pending']} pending, ")
    line.append(f"{deltas['refused']} refused", "yellow" if deltas["refused"] else "")
    if status["refusals"]:
        line.append(f" ({', '.join(f'{plain(why)} {count}' for why, count in status['refusals'].items())})", "yellow")
    return line


def _notes(status: Status) -> Iterator[Text]:
    """What a stopped server has noted in refusals.json, the most frequent first."""
    notes = status.get("refusal_notes", [])
    for note in notes[:NOTES_MAX]:
        yield Text(f"{plain(note['worker'])}: {note['count']} times, at last: {plain(note['last'])}", "yellow")
    if len(notes) > NOTES_MAX:
        yield Text(f"{len(notes) - NOTES_MAX} more kinds: hetero-async audit shows them", "yellow")


def _probes(status: Status) -> Iterator[Text]:
    """Whose layers answer otherwise than the reference's; the server's words."""
    told = [reason for worker in status["workers"] if (reason := worker.get("probe", "")) not in GOOD_PROBES]
    for reason in told[:NOTES_MAX]:
        yield Text(plain(reason), "bold red")
    if len(told) > NOTES_MAX:
        yield Text(f"{len(told) - NOTES_MAX} more workers", "bold red")


def _quarantine(status: Status) -> list[Text]:
    """One line a key, with what to do."""
    return [
        Text(
            f"{plain(line['worker'])}: {plain(line['reason'])}; "
            f"when it is mended: hetero-async keys lift '{plain(line['key'])}'",
            "red",
        )
        for line in status.get("quarantine", [])
    ]


# --- who has everything? ---


def _serving(status: Status) -> Text:
    """Who serves, and how far behind its standbys are; a standby tells what it last heard of that."""
    line = Text(plain(status["server"] or "?"))
    if status.get("durability") == "replicated":
        line.append(", replicated")
    for standby in status.get("standbys", []):
        is_partner = standby["standby"] == status["partner"]
        line.append(f"; standby {plain(standby['standby'])}{' (partner)' if is_partner else ''}: ")
        if not standby["in_reach"]:
            line.append(f"silent {duration(standby['seconds_since_heard'])}", "red")
        elif standby["lag"] > NEAR_RECORDS:
            line.append(f"{standby['lag']} records behind", "yellow")
        else:
            line.append("in step", "green")
    if "standby" in status:
        line.append(f"; told by standby {plain(status['standby']['name'])}", "yellow")
    return line


def _archive(archive: Status) -> Text:
    line = Text(f"records up to {archive['lsn']}, checkpoint of record {archive['checkpoint']}, ")
    line.append(f"all that was due {duration(archive['seconds_behind'])} ago")
    if why := archive["alarm"] or archive["failing"]:
        line.append(f"  {plain(why)}; until it is well, the log only grows", "bold red")
    return line


def _remains(status: Status) -> Iterator[Text]:
    """Nothing runs, and this is what the disk says."""
    if remains := status.get("remains"):
        yield Text(f"no server is running; this is what {plain(remains['directory'])} holds:", "bold red")
        yield Text(
            f"log up to record {remains['lsn']}, last written {plain(remains['written'])}; "
            f"checkpoint of record {remains['checkpoint']}" + (f"; {plain(why)}" if (why := remains["damage"]) else ""),
            "bold red" if remains["damage"] else "",
        )


def _state(text: str) -> Text:
    """Coloured by its first word: `paused: no space left` is as red as `paused`."""
    return Text(text, STYLES.get(text.split(":")[0].split(" ")[0], "yellow"))
