"""The table and the picture of the kept results."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from workload import BUDGET_STEPS

TARGETS = (2.7, 2.4)  # nats a byte; what a peer came to within the budget or the limit stands beside them
HEAD = (
    "",
    *(f"to {target} nats" for target in TARGETS),
    "budget trained",
    "loss",
    "sent",
    "longest stall",
    "not in the model",
    "by hand; remarks",
)
# A step of all their peers may have held more samples than its target, which are what it is counted as.
AT_MOST = ("hivemind", "hivemind, delayed")
COLOURS = {
    "hetero_async": "C3",
    "hetero_async, standby": "C1",
    "torchft": "C0",
    "hivemind": "C2",
    "hivemind, delayed": "C8",
    "Flower": "C4",
    "DDP": "C7",
}


def write(results: Path, peers: Mapping[str, Any], scenarios: Mapping[str, str]) -> None:
    """Print the tables and the settings, and draw `results`/peers.png: each kept run by itself."""
    kept = [json.loads(line) for path in sorted(results.glob("*.jsonl")) for line in path.read_text().splitlines()]
    kept.sort(key=lambda found: (list(peers).index(found["peer"]), found["date"]))
    for scenario, kills in scenarios.items():
        rows = [_row(found, peers[found["peer"]][0], kills) for found in kept if found["scenario"] == scenario]
        if rows:
            print(f"\n{scenario}\n")
            print("\n".join(f"| {' | '.join(row)} |" for row in [HEAD, ["---"] * len(HEAD), *rows]))
    for module in dict.fromkeys(module for module, _, _ in peers.values()):
        print(f"\n{module.__name__}: {module.SETTINGS}")
    if kept:
        _draw(kept, list(peers), list(scenarios), results / "peers.png")


def line(found: Mapping[str, Any]) -> str:
    """One result, while others are still to come."""
    return f"{found['scenario']}: {' | '.join(_row(found))}"


def seconds_to(curve: Sequence[Sequence[float]], target: float) -> float | None:
    """When the validation loss was that low for the first time."""
    return next((seconds for seconds, _, loss in curve if loss <= target), None)


def _row(found: Mapping[str, Any], module: Any = None, kills: str = "") -> list[str]:
    if "error" in found:
        return [found["peer"], f"did not run: {found['error']}", *[""] * (len(HEAD) - 2)]
    times = [seconds_to(found["curve"], target) for target in TARGETS]
    trained, in_model = found["steps_trained"], found["steps_in_model"]
    by_hand = [module.BY_HAND[kills]] if module and kills else []
    again = ", ".join(f"{name} × {count}" for name, count in found["started_again"].items())
    return [
        found["peer"],
        *("not reached" if seconds is None else f"{seconds:.0f} s" for seconds in times),
        f"{found['seconds']:.0f} s"
        if found["finished"]
        else f"{in_model / BUDGET_STEPS:.0%} in {found['seconds']:.0f} s",
        f"{found['curve'][-1][2]:.2f}",
        f"{found['megabytes_sent']:.0f} MB",
        f"{found['stall_seconds']:.1f} s",
        f"{'at most ' if found['peer'] in AT_MOST else ''}{max(0, trained - in_model):.0f} of {trained} steps",
        "; ".join([*by_hand, *([f"started again: {again}"] if again else []), *found["remarks"]]),
    ]


def _draw(kept: Sequence[Mapping[str, Any]], peers: Sequence[str], scenarios: Sequence[str], path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), sharex=True, sharey=True, layout="constrained")
    for axis, scenario in zip(axes.flat, scenarios, strict=True):
        for found in kept:
            if found["scenario"] == scenario and found["curve"]:
                peer, colour = found["peer"], COLOURS[found["peer"]]
                seconds, _, losses = zip(*found["curve"], strict=True)
                axis.plot(seconds, losses, color=colour, label=peer, linewidth=2.2 if peer == peers[0] else 1.4)
                for at, _ in found["kills"]:
                    axis.axvline(at, color=colour, linewidth=0.8, linestyle=":")
        for target in TARGETS:
            axis.axhline(target, color="0.85", linewidth=0.8, zorder=0)
        axis.set(title=scenario, ylim=(2.1, 4.0), xlim=(0, 90))
        axis.spines[["top", "right"]].set_visible(False)
    named = {label: each for axis in axes.flat for each, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    shown = [peer for peer in peers if peer in named]
    figure.legend([named[peer] for peer in shown], shown, loc="outside upper center", ncols=len(shown), frameon=False)
    figure.supxlabel("seconds since the first step (dotted: the kill)")
    figure.supylabel("validation loss, nats a byte")
    figure.savefig(path, dpi=110)
