"""Learning studies: a world file in, curves out; the same file gives the same curves."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hetero_async.errors import ConfigError
from hetero_async.sim.learning import study
from hetero_async.sim.worldfile import load

TINY = """
name = "tiny"
steps = 60

[run]
rule = "sgd"
steps_per_round = 4

[model]
layers = 1
width = 16
heads = 2
context = 16
batch = 4
learning_rate = 0.01

[sites.near]
workers = 1
step_seconds = 0.1

[sites.far]
workers = 1
step_seconds = 0.15
delay = 0.1
jitter = 0.02

[evaluation]
points = 5
windows = 32
"""
VARIANTS = """
[variants.plain]

[variants.coarse.run]
codec_up = "int4"

[variants.alone.sites.far]
workers = 0
"""
FAULTS = """
[[faults]]
at = 1.0
kind = "kill server"
seconds = 1.0

[[faults]]
at = 2.0
kind = "cut link"
target = "far"
seconds = 2.0

[[faults]]
at = 3.0
kind = "cut worker's power"
target = "near-0"
seconds = 1.0
"""


def studied(directory: Path, world: str, name: str = "world") -> dict[str, Any]:
    """What stands in the JSON that a world file leads to."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"{name}.toml"
    file.write_text(world)
    done = study(file, directory / "out", lambda _: None, processes=1)
    written: dict[str, Any] = json.loads(done.json_path.read_text())
    return written


def test_loss_falls_while_virtual_time_and_tokens_grow(tmp_path: Path) -> None:
    (run,) = studied(tmp_path, TINY)["variants"]["tiny"]["seeds"].values()
    seconds, tokens, steps, versions, losses = zip(*run["curve"], strict=True)
    assert losses[0] == pytest.approx(5.55, abs=0.05)  # ln 256: nothing is known yet
    assert run["final_loss"] == losses[-1] < losses[0] - 0.5
    for column in (seconds, tokens, steps, versions):
        assert list(column) == sorted(column)
    assert (tokens[0], tokens[-1]) == (0, 60 * 4 * 16)
    assert not run["problem"]
    assert run["acknowledged"] > 0
    assert run["bytes_up"] > 0 < run["bytes_down"]


def test_same_file_gives_the_same_curves(tmp_path: Path) -> None:
    first, second = (studied(tmp_path / name, TINY + FAULTS) for name in "ab")
    assert first == second
    assert not first["variants"]["tiny"]["seeds"]["0"]["problem"]


def test_the_command_line_writes_the_figures_and_a_picture(tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    file, out = tmp_path / "smallest.toml", tmp_path / "deep/out"
    file.write_text((TINY + FAULTS).replace("steps = 60", "steps = 12"))
    command = [sys.executable, "-m", "hetero_async", "sim", "--world", str(file), "--out", str(out), "--processes", "1"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert answer.returncode == 0, answer.stderr
    figures, picture = out / "smallest.json", out / "smallest.png"
    assert sorted(out.iterdir()) == [figures, picture]
    (run,) = json.loads(figures.read_text())["variants"]["tiny"]["seeds"].values()
    best, *wrote = answer.stdout.splitlines()
    assert best.startswith(f"tiny  loss {run['final_loss']:.4f} (")
    assert wrote == [f"wrote {figures}", f"wrote {picture}"]
    assert "[1/1] tiny, seed 0: loss" in answer.stderr
    pixels = pyplot.imread(picture)  # which reads all of it
    assert min(pixels.shape[:2]) > 100
    assert pixels.std() > 0, "something is drawn"


def test_seeds_differ(tmp_path: Path) -> None:
    runs = studied(tmp_path, TINY.replace("steps = 60", "steps = 60\nseeds = [0, 1]", 1))["variants"]["tiny"]["seeds"]
    assert list(runs) == ["0", "1"]
    assert runs["0"]["curve"] != runs["1"]["curve"]


def test_variants_override_keys_and_keep_the_rest(tmp_path: Path) -> None:
    written = studied(tmp_path, TINY + VARIANTS)["variants"]
    assert list(written) == ["plain", "coarse", "alone"]
    plain, coarse, alone = (written[name] for name in written)
    assert [variant["settings"]["run"]["codec_up"] for variant in (plain, coarse)] == ["int8", "int4"]
    assert coarse["settings"]["run"]["steps_per_round"] == 4
    assert coarse["seeds"]["0"]["bytes_up"] < plain["seeds"]["0"]["bytes_up"]
    assert alone["seeds"]["0"]["virtual_seconds"] > plain["seeds"]["0"]["virtual_seconds"]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('rule = "sgd"', 'rul = "sgd"', 'run.rul = "sgd": unknown key (did you mean rule?); known keys: merge, '),
        ('rule = "sgd"', 'rule = "adam"', "run.rule = \"adam\": must be 'nesterov', 'lookahead' or 'sgd'"),
        ("layers = 1", "layers = 0", "model.layers = 0: must be greater than or equal to 1"),
        ("width = 16", "width = 15", "model.width = 15: must be a multiple of model.heads = 2"),
        ("steps = 60", "", "steps = 0: must be greater than 0"),
        ("delay = 0.1", "dealy = 0.1", "sites.far.dealy = 0.1: unknown key (did you mean delay?)"),
        ("step_seconds = 0.1\n", "", "sites.near.step_seconds is missing"),
        ('target = "far"', 'target = "near-0"', 'faults.1.target = "near-0": must be one of near, far'),
        ('kind = "kill server"', 'kind = "flood"', 'faults.0.kind = "flood": must be one of kill worker, '),
        ('codec_up = "int4"', "codec_up = 4", "variants.coarse.run.codec_up = 4: must be 'fp32', 'bf16', "),
        ("[variants.coarse.run]", "[variants.coarse.rum]", "variants.coarse.rum = a table: unknown key (did you mean"),
        ("[variants.plain]", "[variants]\nplain = 1", "variants.plain = 1: must be a table"),
        ("[sites.near]", "[sites.near", "is not valid TOML"),
    ],
)
def test_a_bad_key_is_named(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    file = tmp_path / "world.toml"
    text = TINY + FAULTS + VARIANTS
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert str(caught.value).startswith(f"{file}: {complaint}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[2] / "examples/worlds").glob("*.toml")), ids=str)
def test_example_worlds_are_good(file: Path) -> None:
    assert len(load(file)) == {"codecs": 7}.get(file.stem, 3)
