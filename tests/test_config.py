"""run.toml: what it means, and what a person reads when it is wrong."""

import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from hetero_async.config import ENV_RUN, ENV_WORKER, RunConfig, from_environment
from hetero_async.core.records import RunSettings
from hetero_async.errors import ConfigError
from hetero_async.tables import TrainingTable, template

SMALLEST = """
[run]
name = "byte-gpt"
samples = 1000
[server]
site = "amsterdam"
[sites.amsterdam]
workers = 2
[sites.office]
workers = 1
"""


def written(directory: Path, text: str) -> Path:
    path = directory / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_short_file_takes_every_default_from_the_settings(tmp_path: Path) -> None:
    config = RunConfig.load(written(tmp_path, SMALLEST))

    assert config.settings() == RunSettings(run="byte-gpt", samples=1000)
    assert config.workers() == [("amsterdam", "amsterdam-0"), ("amsterdam", "amsterdam-1"), ("office", "office-0")]
    assert (config.server.address, config.node("server").bulk) == ("tcp://127.0.0.1:7710", "tcp://127.0.0.1:7711")


def test_every_training_key_is_a_setting_of_the_run() -> None:
    of_run = {"run", "seed", "samples", "passes"}
    assert set(TrainingTable.model_fields) == {field.name for field in fields(RunSettings)} - of_run


def test_paths_are_relative_to_the_file_not_to_the_working_directory(tmp_path: Path) -> None:
    config = RunConfig.load(written(tmp_path, SMALLEST.replace("[server]", 'directory = "state"\n[server]')))

    assert config.directory == tmp_path / "state"
    assert (config.keys, config.log) == (tmp_path / "state/keys", tmp_path / "state/log")
    assert config.checkpoints == tmp_path / "state/checkpoints"
    assert config.worker_directory("office-0") == tmp_path / "state/workers/office-0"


def test_a_bulk_address_is_used_when_given(tmp_path: Path) -> None:
    text = SMALLEST.replace("[server]", '[server]\nbulk_address = "tcp://[::1]:9000"')
    assert RunConfig.load(written(tmp_path, text)).node("server").bulk == "tcp://[::1]:9000"


def test_sites_that_join_by_themselves_need_not_be_listed(tmp_path: Path) -> None:
    config = RunConfig.load(written(tmp_path, SMALLEST.split("[sites")[0]))
    assert (config.workers(), config.server.site) == ([], "amsterdam")
    assert RunConfig.load(written(tmp_path, template(run={"name": "a"}, sites={}))).server.site == "server"


def test_what_sites_are_told_leaves_out_how_the_server_s_own_host_is_set_up(tmp_path: Path) -> None:
    own = {"checkpoint_every": 9, "keep_log": True, "archive": "s3://bucket/run"}
    text = template(run={"name": "a", "directory": "/srv/a"}, sites={"lab": 1}, server=own)
    told = RunConfig.load(written(tmp_path, text)).told_to_sites()
    assert told["server"] == {"site": "lab", "address": "tcp://127.0.0.1:7710", "bulk_address": ""}
    assert told["run"] == {"name": "a", "samples": 200_000}
    assert set(told) == {"run", "server", "training", "standbys"}


def test_values_are_frozen(tmp_path: Path) -> None:
    config = RunConfig.load(written(tmp_path, SMALLEST))
    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 1


@pytest.mark.parametrize("run", [{"name": "a"}, {"name": "a", "passes": 2.5}, {"name": "a", "samples": 7}])
def test_the_template_loads_and_says_the_same(tmp_path: Path, run: dict[str, object]) -> None:
    text = template(run=run, sites={"lab": 1, "den": 3}, server={"checkpoint_every": 9}, training={"codec_up": "int4"})
    config = RunConfig.load(written(tmp_path, text))

    assert config.settings().passes == run.get("passes", 0)
    assert config.settings().samples == (run.get("samples", 200_000) if "passes" not in run else 0)
    assert (config.server.site, config.server.checkpoint_every, config.training.codec_up) == ("lab", 9, "int4")
    assert {site: table.workers for site, table in config.sites.items()} == {"lab": 1, "den": 3}


def test_the_template_comments_on_every_key() -> None:
    text = template(run={"name": "a"}, sites={"lab": 1})
    lines = [line for line in text.splitlines() if " = " in line]
    assert all(re.search(r"\S +# \S", line) for line in lines), lines
    written_keys = {line.removeprefix("# ").split(" = ")[0] for line in lines}
    assert written_keys >= set(TrainingTable.model_fields) | {"samples", "passes", "bulk_address", "workers"}


def test_commented_examples_of_the_template_are_valid_when_uncommented(tmp_path: Path) -> None:
    text = template(run={"name": "a"}, sites={"lab": 1})
    text = re.sub(r"^samples", "# samples", text, flags=re.MULTILINE)
    text = re.sub(r"^# (passes|bulk_address)", r"\1", text, flags=re.MULTILINE)
    assert RunConfig.load(written(tmp_path, text)).settings().passes == 3


BAD = [
    # what replaces what in the smallest good file, and the line that a person reads
    (
        "samples = 1000",
        "sample = 1000",
        "run.sample = 1000: unknown key (did you mean samples?); known keys: name, directory, samples, passes, seed",
    ),
    (
        "[run]",
        "[rum]\n[run]",
        "rum = a table: unknown key (did you mean run?); "
        "known keys: run, server, training, sites, standbys, witness, plan",
    ),
    (
        "[sites.office]\nworkers = 1",
        "[sites.office]",
        "sites.office.workers is missing: must be a whole number at least 0 and at most 1000",
    ),
    (
        "[sites.office]\nworkers = 1",
        "[sites.office]\nworker = 1",
        "sites.office.worker = 1: unknown key (did you mean workers?); known keys: workers",
    ),
    ("[sites.office]\nworkers = 1", "[sites]\noffice = 1", "sites.office = 1: must be a table"),
    ('name = "byte-gpt"', "", "run.name is missing: must be text in quotes"),
    ('name = "byte-gpt"', "name = 7", "run.name = 7: must be text in quotes"),
    (
        'name = "byte-gpt"',
        'name = "Byte GPT"',
        'run.name = "Byte GPT": must be 1 to 32 of a-z, 0-9 and -, not starting with -',
    ),
    ("samples = 1000", 'samples = "1000"', 'run.samples = "1000": must be a whole number greater than 0'),
    ("samples = 1000", "samples = true", "run.samples = true: must be a whole number greater than 0"),
    ("samples = 1000", "samples = 0", "run.samples = 0: must be a whole number greater than 0"),
    (
        "samples = 1000",
        "samples = 1000\npasses = 3",
        "run.passes = 3: run.samples is given too; keep exactly one of them",
    ),
    ("samples = 1000", "passes = nan", "run.passes = NaN: must be a number greater than 0"),
    ("samples = 1000", "", "run.samples is missing: exactly one of run.samples and run.passes must be given"),
    (
        "samples = 1000",
        "samples = 1000\nseed = -1",
        "run.seed = -1: must be a whole number at least 0 and less than 4294967296",
    ),
    (
        'site = "amsterdam"',
        'site = "Amster dam"',
        'server.site = "Amster dam": must be 1 to 32 of a-z, 0-9 and -, not starting with -',
    ),
    ('site = "amsterdam"', 'site = "amsterdam"\nkeep_log = 1', "server.keep_log = 1: must be true or false"),
    (
        'site = "amsterdam"',
        'site = "amsterdam"\naddress = "127.0.0.1:7710"',
        'server.address = "127.0.0.1:7710": must be tcp://HOST:PORT, for example tcp://127.0.0.1:7710',
    ),
    (
        'site = "amsterdam"',
        'site = "amsterdam"\naddress = "tcp://here:70000"',
        'server.address = "tcp://here:70000": must be tcp://HOST:PORT, for example tcp://127.0.0.1:7710',
    ),
    (
        'site = "amsterdam"',
        'site = "amsterdam"\naddress = "tcp://here:65535"',
        'server.address = "tcp://here:65535": no port is left for bulk; give server.bulk_address as well',
    ),
    (
        'site = "amsterdam"',
        'site = "amsterdam"\nbulk_address = "tcp://127.0.0.1:7710"',
        'server.bulk_address = "tcp://127.0.0.1:7710": must differ from server.address',
    ),
    (
        'site = "amsterdam"',
        'site = "amsterdam"\nbulk_address = "udp://x:1"',
        'server.bulk_address = "udp://x:1": must be tcp://HOST:PORT, for example tcp://127.0.0.1:7710',
    ),
    (
        "[server]",
        '[training]\ncodec_up = "int9"\n[server]',
        'training.codec_up = "int9": must be one of fp32, bf16, int8, int4, e3m0, 2bit, topk (did you mean int8?)',
    ),
    (
        "[server]",
        '[training]\nmerge = "all "\n[server]',
        'training.merge = "all ": must be one of window, per-push, all (did you mean all?)',
    ),
    (
        "[server]",
        "[training]\nrule = 3\n[server]",
        "training.rule = 3: must be one of auto, nesterov, lookahead, delayed-nesterov, sgd",
    ),
    (
        "[server]",
        "[training]\nmomentum = 1\n[server]",
        "training.momentum = 1: must be a number at least 0 and less than 1",
    ),
    (
        "[server]",
        "[training]\ngrace = inf\n[server]",
        "training.grace = Infinity: must be a number at least 0 and at most 1",
    ),
    (
        "[server]",
        "[training]\nlease_ttl_seconds = 1\n[server]",
        "training.lease_ttl_seconds = 1: must be a number at least 3",
    ),
    ("[server]", "[training]\nnorm_gate = []\n[server]", "training.norm_gate = a list: must be a number at least 0"),
    ("[run]", "training = 5\n[run]", "training = 5: must be a table"),
    (
        "workers = 2",
        "workers = 2.5",
        "sites.amsterdam.workers = 2.5: must be a whole number at least 0 and at most 1000",
    ),
    (
        "[sites.office]",
        '[sites."Head Office"]',
        "sites.Head Office: a site's name must be 1 to 32 of a-z, 0-9 and -, not starting with -",
    ),
]


@pytest.mark.parametrize(("good", "bad", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, good: str, bad: str, message: str) -> None:
    assert good in SMALLEST
    path = written(tmp_path, SMALLEST.replace(good, bad, 1))
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(path)
    assert str(caught.value) == f"{path}: {message}"


def test_broken_toml_is_located(tmp_path: Path) -> None:
    path = written(tmp_path, SMALLEST.replace("[run]", "[run"))
    with pytest.raises(ConfigError, match=r"run\.toml: is not valid TOML: [^\n]*line 2") as caught:
        RunConfig.load(path)
    assert "\n" not in str(caught.value)


def test_a_long_value_is_not_repeated_in_full(tmp_path: Path) -> None:
    path = written(tmp_path, SMALLEST.replace("byte-gpt", "x" * 5000))
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(path)
    assert len(str(caught.value)) < 200 + len(str(path))


def test_missing_directory_and_unreadable_files_say_so(tmp_path: Path) -> None:
    missing = tmp_path / "none.toml"
    with pytest.raises(ConfigError, match="there is no such file; write one with: hetero-async init"):
        RunConfig.load(missing)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        RunConfig.load(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        RunConfig.load(tmp_path / "latin.toml")


def test_a_training_script_finds_its_run_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_RUN, str(written(tmp_path, SMALLEST)))
    monkeypatch.setenv(ENV_WORKER, "office-0")
    config, worker = from_environment()
    assert (config.run.name, worker) == ("byte-gpt", "office-0")


def test_a_script_started_by_hand_is_told_how_to_start_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV_RUN, raising=False)
    monkeypatch.delenv(ENV_WORKER, raising=False)
    with pytest.raises(ConfigError, match=r"start this script with: hetero-async work --site NAME -- python train.py"):
        from_environment()


def test_a_worker_that_the_run_does_not_have_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, SMALLEST)
    monkeypatch.setenv(ENV_RUN, str(path))
    monkeypatch.setenv(ENV_WORKER, "office-1")
    with pytest.raises(ConfigError) as caught:
        from_environment()
    allowed = "amsterdam-0, amsterdam-1, office-0"
    assert str(caught.value) == f'{ENV_WORKER} = "office-1": must be one of {allowed} ({path})'


def test_the_smallest_file_of_these_tests_is_toml() -> None:
    assert set(tomllib.loads(SMALLEST)) == {"run", "server", "sites"}
