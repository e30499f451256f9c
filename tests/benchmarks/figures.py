"""What benchmarks find: each figure a ratio to a yardstick that was measured in the same run, taking turns with it."""

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

KEPT = Path("build/bench.json")
TURNS = 5
CONSOLE = Console(width=118, highlight=False)


@dataclass(frozen=True, slots=True)
class Figure:
    """`value` and `yardstick` in `unit`; `ratio` is the median of the turns' own. `goal`: what the ratio must be."""

    name: str
    value: float
    yardstick: float
    unit: str
    ratio: float
    goal: str = ""
    met: bool | None = None


@dataclass
class Figures:
    """Of one run of the benchmarks."""

    found: list[Figure] = field(default_factory=list)

    def add(
        self,
        name: str,
        turns: list[tuple[float, float]],
        unit: str,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> Figure:
        """`turns`: (value, yardstick) of each."""
        value, yardstick = (statistics.median(column) for column in zip(*turns, strict=True))
        ratio = statistics.median(value / yardstick for value, yardstick in turns)
        goal = f"≤ {at_most:g}" if at_most is not None else f"≥ {at_least:g}" if at_least is not None else ""
        met = ratio <= at_most if at_most is not None else ratio >= at_least if at_least is not None else None
        figure = Figure(name, value, yardstick, unit, ratio, goal, met)
        self.found.append(figure)
        is_met = {None: "", True: ": met", False: ": [bold]not met[/bold]"}[met]
        CONSOLE.print(f"{name}: {value:.4g} against {yardstick:.4g} {unit}, ratio {ratio:.2f} {goal}{is_met}")
        return figure

    def keep(self, path: Path = KEPT) -> None:
        """In place of what the same benchmarks found before; what others found stays."""
        names = {figure.name for figure in self.found}
        before = json.loads(path.read_text()) if path.exists() else []
        kept = [figure for figure in before if figure["name"] not in names] + [asdict(figure) for figure in self.found]
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")

    def show(self) -> None:
        table = Table(title="measured against a yardstick of the same run")
        for column in ("benchmark", "value", "yardstick", "", "ratio", "goal", "met"):
            table.add_column(column, justify="left" if column in ("benchmark", "") else "right")
        for figure in self.found:
            met = {None: "", True: "yes", False: "no"}[figure.met]
            sizes = (f"{number:.4g}" for number in (figure.value, figure.yardstick))
            table.add_row(figure.name, *sizes, figure.unit, f"{figure.ratio:.2f}", figure.goal, met)
        CONSOLE.print(table)


@contextlib.contextmanager
def on_threads(count: int) -> Iterator[None]:
    """torch divides its work among so many: what is compared must have as many."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turns(
    work: Callable[[], object], yardstick: Callable[[], object], turns: int = TURNS
) -> list[tuple[float, float]]:
    """Seconds of both, after a turn that does not count."""
    return [(seconds(work), seconds(yardstick)) for _ in range(turns + 1)][1:]
