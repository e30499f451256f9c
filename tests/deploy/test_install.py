"""What deploy/ installs: units that systemd takes, scripts without a fault, and a service that outlives its upgrade."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from e2e.commands import background
from e2e.harness import free_port, until

from hetero_async.looking import verify_directory

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
INSTALL = DEPLOY / "install.sh"
TINY = ROOT / "tests/e2e/tiny.py"
EXPOSURE_MAX = 3.0
SECONDS_MAX = 90.0
PROGRAMS = Path(sys.executable).parent  # of this environment

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")


def install(*words: object, is_good: bool = True) -> str:
    said = subprocess.run([INSTALL, *map(str, words)], capture_output=True, text=True, timeout=SECONDS_MAX, check=False)
    assert (said.returncode == 0) == is_good, said.stdout + said.stderr
    return said.stdout if is_good else said.stderr


def installed(root: Path) -> dict[str, str]:
    """Every file and link, and what is in it."""
    return {
        path.relative_to(root).as_posix(): os.readlink(path) if path.is_symlink() else path.read_text()
        for path in sorted(root.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


# --- units and scripts ---


@needs_systemd
@pytest.mark.parametrize("unit", ["hetero-async-server@.service", "hetero-async-site@.service"])
def test_systemd_finds_nothing_wrong_with_a_unit_and_little_exposed(tmp_path: Path, unit: str) -> None:
    install("server", "demo", "--root", tmp_path, "--environment", PROGRAMS.parent)
    here = tmp_path / unit
    here.write_text((DEPLOY / "systemd" / unit).read_text().replace("/opt/", f"{tmp_path}/opt/"))
    told = subprocess.run(["systemd-analyze", "verify", here], capture_output=True, text=True, check=False)
    assert (told.returncode, told.stderr) == (0, "")
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", here], capture_output=True, text=True, check=False
    )
    (exposure,) = re.findall(r"Overall exposure level for \S+: ([\d.]+)", rated.stdout)
    assert float(exposure) <= EXPOSURE_MAX


@pytest.mark.parametrize("script", ["install.sh", "node", "slurm/site.sbatch"])
def test_shellcheck_finds_nothing_wrong_with_a_script(script: str) -> None:
    told = subprocess.run([PROGRAMS / "shellcheck", DEPLOY / script], capture_output=True, text=True, check=False)
    assert (told.returncode, told.stdout) == (0, "")


# --- the installer ---


def test_what_is_installed_twice_is_installed_once(tmp_path: Path) -> None:
    words = ("server", "demo", "--root", tmp_path, "--environment", PROGRAMS.parent)
    install(*words)
    first = installed(tmp_path)
    assert first["etc/hetero-async/demo.server.env"] == "ROLE=server\nNAME=server\n"
    assert first["opt/hetero-async/current"].startswith("releases/environment-")
    (tmp_path / "etc/hetero-async/demo.server.env").write_text("ROLE=standby\nNAME=b\n")
    assert "kept" in install(*words)
    changed = {**first, "etc/hetero-async/demo.server.env": "ROLE=standby\nNAME=b\n"}
    assert installed(tmp_path) == changed, "what the operator wrote stays"


def test_a_dry_run_says_what_it_would_do_and_does_nothing(tmp_path: Path) -> None:
    said = install("site", "demo", "--site", "a", "--train", "python t.py", "--root", tmp_path, "--dry-run")
    assert f"+ write {tmp_path}/etc/hetero-async/demo.site.env" in said
    assert "pip install" in said
    assert not list(tmp_path.iterdir())


def test_uninstalling_leaves_the_runs(tmp_path: Path) -> None:
    install("server", "demo", "--root", tmp_path, "--environment", PROGRAMS.parent)
    install("site", "demo", "--site", "a", "--train", "t", "--root", tmp_path, "--environment", PROGRAMS.parent)
    kept = tmp_path / "var/lib/hetero-async/demo/run.toml"
    kept.parent.mkdir()
    kept.write_text("a run")
    assert "the runs are still in" in install("uninstall", "--root", tmp_path)
    assert installed(tmp_path) == {"var/lib/hetero-async/demo/run.toml": "a run"}


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ((), "'' is not server, standby, site or uninstall"),
        (("serve", "demo"), "'serve' is not server, standby, site or uninstall"),
        (("server",), "say which run"),
        (("server", "My Run"), "RUN is 'My Run': it may have a-z, 0-9 and - in it"),
        (("standby", "demo"), "a standby needs --name: a [standbys.NAME] of run.toml"),
        (("site", "demo", "--train", "t"), "a site needs --site SITE, as in run.toml"),
        (("site", "demo", "--site", "a"), "a site needs --train 'python train.py'"),
        (("server", "demo", "--nmae", "b"), "unknown option --nmae"),
        (("server", "demo", "--name"), "--name needs a value"),
        (("server", "demo", "--environment", "/nowhere"), "/nowhere has no bin/hetero-async"),
    ],
)
def test_bad_words_are_told_in_one_line(tmp_path: Path, words: tuple[str, ...], complaint: str) -> None:
    assert f"error: {complaint}" in install(*words, *(("--root", tmp_path) if words else ()), is_good=False)


# --- what was installed ---


@pytest.mark.parametrize(("code", "follows"), [(69, True), (0, False), (65, False)])
def test_a_server_that_was_deposed_goes_on_as_a_standby(tmp_path: Path, code: int, follows: bool) -> None:
    install("server", "demo", "--root", tmp_path, "--environment", PROGRAMS.parent)
    current, heard = tmp_path / "opt/hetero-async/current", tmp_path / "heard"
    program = current.resolve() / "bin/hetero-async"
    program.unlink()
    program.write_text(f'#!/bin/sh\necho "$@" >>{heard}\n[ "$1" = serve ] && exit {code}\nexit 7\n')
    program.chmod(0o755)
    environment = {**os.environ, "ROLE": "server", "NAME": "b", "HETERO_ASYNC_STATE": "/state"}
    ended = subprocess.run([current / "libexec/node", "demo"], env=environment, timeout=SECONDS_MAX, check=False)
    rest = "--run /state/demo/run.toml --name b"
    assert heard.read_text().splitlines() == [f"serve {rest}", *([f"standby {rest}"] if follows else [])]
    assert ended.returncode == (7 if follows else code)


def test_a_run_goes_on_through_an_upgrade_of_its_server(tmp_path: Path) -> None:
    state, current = tmp_path / "var/lib/hetero-async", tmp_path / "opt/hetero-async/current"
    run, hold, other = state / "demo/run.toml", tmp_path / "hold", tmp_path / "newer"
    words = ("server", "demo", "--root", tmp_path, "--environment")
    install(*words, PROGRAMS.parent)
    program = current / "bin/hetero-async"
    address = f"tcp://127.0.0.1:{free_port()}"
    init = [
        program,
        "init",
        run.parent,
        "--name",
        "demo",
        "--site",
        "here=1",
        "--samples",
        "1600",
        "--address",
        address,
    ]
    subprocess.run(init, check=True, capture_output=True, timeout=SECONDS_MAX)
    server = (tmp_path / "server.output", current / "libexec/node", "demo")
    told = {"ROLE": "server", "NAME": "server", "HETERO_ASYNC_STATE": state}
    train = ("--", sys.executable, TINY, "--hold", hold)
    hold.touch()
    with background(tmp_path / "site.output", program, "work", "--run", run, "--site", "here", *train) as site:
        story = lambda: "".join(path.read_text() for path in tmp_path.glob("*.output"))  # noqa: E731
        with background(*server, **told) as first:
            until(Path(f"{hold}.reached-here-0").exists, "the worker has begun", SECONDS_MAX, story)
            before = os.readlink(current)
            other.symlink_to(PROGRAMS.parent)
            install(*words, other)
            assert os.readlink(current) != before
            os.killpg(first.pid, signal.SIGTERM)
            first.wait(SECONDS_MAX)
        with background(*server, **told):
            hold.unlink()
            until(lambda: site.poll() is not None, "the site's workers have ended", SECONDS_MAX, story)
            assert site.returncode == 0, story()
    verdict = verify_directory(run.parent / "log", lambda _: None)
    assert verdict.is_ok
    assert verdict.samples == 1600
