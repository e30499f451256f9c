"""One simulated run of real training: a world file in, a curve out; the same file gives the same curve."""

from pathlib import Path

import pytest

from hetero_async.errors import ConfigError, UserError
from hetero_async.sim.corpus import domains, standard_library
from hetero_async.sim.learning import Run, run
from hetero_async.sim.worldfile import Variant, load

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


def variants(directory: Path, world: str) -> dict[str, Variant]:
    """By their titles."""
    file = directory / "world.toml"
    file.write_text(world)
    return {variant.title: variant for variant in load(file).variants}


def learned(directory: Path, world: str, seed: int = 0) -> Run:
    (variant,) = variants(directory, world).values()
    return run(variant, seed)


def test_loss_falls_while_virtual_time_and_tokens_grow(tmp_path: Path) -> None:
    done = learned(tmp_path, TINY)
    seconds, tokens, steps, versions, losses = zip(*done.curve, strict=True)
    assert losses[0] == pytest.approx(5.55, abs=0.05)  # ln 256: nothing is known yet
    assert done.final_loss == losses[-1] < losses[0] - 0.5
    assert done.choosing_loss is not None
    assert done.choosing_loss == pytest.approx(done.final_loss, abs=0.3)
    assert done.choosing_loss != done.final_loss, "it is another text"
    for column in (seconds, tokens, steps, versions):
        assert list(column) == sorted(column)
    assert (tokens[0], tokens[-1]) == (0, 60 * 4 * 16)
    assert not done.problem
    assert done.acknowledged > 0
    assert done.bytes_up > 0 < done.bytes_down


def test_same_file_gives_the_same_outcome_and_another_seed_another(tmp_path: Path) -> None:
    first, second = (learned(tmp_path, TINY + FAULTS) for _ in range(2))
    assert first == second
    assert not first.problem
    assert learned(tmp_path, TINY + FAULTS, seed=1).curve != first.curve


def test_variants_override_keys_and_keep_the_rest(tmp_path: Path) -> None:
    found = variants(tmp_path, TINY + VARIANTS)
    assert list(found) == ["plain", "coarse", "alone"]
    plain, coarse, alone = (run(variant, 0) for variant in found.values())
    assert [done.settings["run"]["codec_up"] for done in (plain, coarse)] == ["int8", "int4"]
    assert coarse.settings["run"]["steps_per_round"] == 4
    assert coarse.bytes_up < plain.bytes_up
    assert alone.virtual_seconds > plain.virtual_seconds


def test_axes_give_every_combination_its_variants(tmp_path: Path) -> None:
    axes = """
[axes.H.2.run]
steps_per_round = 2

[axes.H.8.run]
steps_per_round = 8

[axes.lr.slow.model]
learning_rate = 0.001

[axes.lr.fast]
"""
    found = variants(tmp_path, TINY + VARIANTS + axes)
    cases = ["H 2, lr slow", "H 2, lr fast", "H 8, lr slow", "H 8, lr fast"]
    assert list(found) == [f"{case}: {name}" for case in cases for name in ("plain", "coarse", "alone")]
    settings = found["H 8, lr slow: coarse"].settings()
    assert (settings["run"]["steps_per_round"], settings["run"]["codec_up"]) == (8, "int4")
    assert settings["model"]["learning_rate"] == 0.001


def test_a_share_of_the_pushes_can_be_lost_and_every_sample_is_trained_on_all_the_same(tmp_path: Path) -> None:
    done = learned(tmp_path, TINY.replace("steps = 60", "steps = 60\nlost_pushes = 0.3", 1))
    assert 0.1 < done.refused / (done.acknowledged + done.refused) < 0.6
    assert done.curve[-1][1] == 60 * 4 * 16
    assert not done.problem


def test_workers_that_nobody_holds_up_are_never_idle_and_those_in_step_are(tmp_path: Path) -> None:
    world = TINY.replace("steps = 60", "steps = 240", 1)
    free = learned(tmp_path, world)
    in_step = learned(tmp_path, world.replace('rule = "sgd"', 'rule = "sgd"\nmerge = "all"\ndylu = false', 1))
    assert free.idle_share < 0.05 < 0.15 < in_step.idle_share


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_workers_own_optimizer_can_be_chosen(tmp_path: Path, optimizer: str) -> None:
    world = TINY.replace("[model]", f'[model]\noptimizer = "{optimizer}"', 1)
    rate = 0.5 if optimizer == "sgd" else 0.01
    done = learned(tmp_path, world.replace("learning_rate = 0.01", f"learning_rate = {rate}", 1))
    assert done.final_loss is not None
    assert done.final_loss < 5.2


# --- what is read ---


def test_the_three_parts_of_a_text_share_nothing() -> None:
    text = standard_library()
    training, choosing, reporting = (
        part[0].numpy().tobytes() for part in (text.training, text.choosing, text.reporting)
    )
    for one, other in ((choosing, training), (reporting, training), (reporting, choosing)):
        assert one[5000:5400] not in other
    assert len(training) > 3 * len(choosing) > 0 < len(reporting)


def test_each_site_has_a_domain_of_its_own() -> None:
    text = domains(("a", "b", "c"))
    found = [text.of_site(site).numpy().tobytes()[:100_000] for site in "abc"]
    assert b"import " in found[0]
    assert b"\\x" in found[1] or b"\\u" in found[1]
    assert b"namespace at" in found[2]
    assert len(text.reporting) == len(text.choosing) == 3
    assert text.fingerprint != standard_library().fingerprint


def test_more_sites_than_domains_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="5 sites and 4 domains of text: Python's programs, "):
        domains(tuple("abcde"))


def test_a_world_whose_sites_read_different_texts_learns_them_all(tmp_path: Path) -> None:
    done = learned(tmp_path, TINY.replace("[model]", '[model]\ntext = "by site"', 1))
    shared = learned(tmp_path, TINY)
    assert done.text != shared.text
    assert done.final_loss is not None
    assert done.final_loss < 5.2


# --- bad files ---


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('rule = "sgd"', 'rul = "sgd"', 'run.rul = "sgd": unknown key (did you mean rule?); known keys: merge, '),
        (
            'rule = "sgd"',
            'rule = "adam"',
            "run.rule = \"adam\": must be 'auto', 'nesterov', 'lookahead', 'delayed-nesterov' or 'sgd'",
        ),
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
        ("[variants.plain]", "[axes]\nH = 1\n[variants.plain]", "axes.H = 1: must be a table"),
        ("[variants.plain]", "[axes.H.1]\nruns = 1\n[variants.plain]", "axes.H.1.runs = 1: unknown key (did you mean"),
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
    assert len(load(file).variants) == {"rules": 4}.get(file.stem, 3)
