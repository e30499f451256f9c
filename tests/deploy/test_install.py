"""What deploy/ installs: units that systemd takes, and scripts that do what they say. test_hosts.py starts it all."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from e2e.commands import background
from e2e.harness import until

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
INSTALL = DEPLOY / "install.sh"
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
@pytest.mark.parametrize("unit", sorted(path.name for path in (DEPLOY / "systemd").iterdir()))
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


@pytest.mark.parametrize("script", ["install.sh", "node", "in-run", "slurm/site.sbatch"])
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
        ((), "'' is not server, standby, site, witness or uninstall"),
        (("serve", "demo"), "'serve' is not server, standby, site, witness or uninstall"),
        (("server",), "say which run"),
        (("server", "My Run"), "RUN is 'My Run': it may have a-z, 0-9 and - in it"),
        (("standby", "demo"), "a standby needs --name: a [standbys.NAME] of run.toml"),
        (("site", "demo", "--train", "t"), "a site needs --site SITE, as in run.toml"),
        (("site", "demo", "--site", "a"), "a site needs --train 'python train.py'"),
        (("server", "demo", "--nmae", "b"), "unknown option --nmae"),
        (("server", "demo", "--name"), "--name needs a value"),
        (("server", "demo", "--join", "tcp://a:1#K"), "a server joins nobody; give --join to the others"),
        (
            ("site", "demo", "--site", "a", "--train", "t", "--", "--samples", "5"),
            "only for a server do words for init",
        ),
        (("witness", "--members", "a=10.0.0.1"), "a witness needs --member NAME"),
        (("witness", "--member", "b", "--members", "a=10.0.0.1"), "a witness needs --member NAME and --members"),
        (("server", "demo", "--environment", "/nowhere"), "/nowhere has no bin/hetero-async"),
    ],
)
def test_bad_words_are_told_in_one_line(tmp_path: Path, words: tuple[str, ...], complaint: str) -> None:
    assert f"error: {complaint}" in install(*words, *(("--root", tmp_path) if words else ()), is_good=False)


# --- what was installed ---


PROGRAM = """#!/bin/sh
echo "$@${{WATCHDOG_PID:+, and looks whether it is process $WATCHDOG_PID}}" >>{heard}
case $1 in serve) exit {serve} ;; standby) [ -e {heard}.again ] || {{ touch {heard}.again; exit {standby}; }} ;; esac
exit 7
"""


@pytest.mark.parametrize(
    ("role", "name", "has_served", "serve", "standby", "verbs", "ends"),
    [
        ("server", "server", False, 0, 0, ["serve"], 0),
        ("server", "server", False, 65, 0, ["serve"], 65),
        ("server", "server", False, 69, 0, ["serve", "standby"], 0),  # deposed: it goes on as a standby
        ("standby", "b", False, 0, 69, ["standby", "standby"], 7),  # promoted, and deposed again
        ("standby", "b", True, 0, 0, ["serve"], 0),  # it served when it was stopped, and nobody else does now
        ("standby", "b", True, 69, 0, ["serve", "standby"], 0),
    ],
)
def test_a_node_serves_when_it_was_the_last_to_serve_and_else_stands_by(
    tmp_path: Path, role: str, name: str, has_served: bool, serve: int, standby: int, verbs: list[str], ends: int
) -> None:
    install("server", "demo", "--root", tmp_path, "--environment", PROGRAMS.parent)
    current, heard, run = tmp_path / "opt/hetero-async/current", tmp_path / "heard", tmp_path / "run"
    replace_program(current, PROGRAM.format(heard=heard, serve=serve, standby=standby))
    (run / f"standby-{name}").mkdir(parents=True)
    if has_served:
        (run / f"standby-{name}/has-served").touch()
    environment = {**os.environ, "ROLE": role, "NAME": name, "WATCHDOG_PID": "1"}  # the shell's, says systemd
    node = [current / "libexec/node"]
    ended = subprocess.run(node, cwd=run, env=environment, timeout=SECONDS_MAX, check=False)
    assert heard.read_text().splitlines() == [f"{verb} --run run.toml --name {name}" for verb in verbs]
    assert ended.returncode == ends


def replace_program(current: Path, text: str) -> None:
    program = current.resolve() / "bin/hetero-async"
    program.unlink()
    program.write_text(text)
    program.chmod(0o755)


def test_what_an_operator_types_is_done_in_the_run_s_directory(tmp_path: Path) -> None:
    install("server", "demo", "--root", tmp_path, "--environment", PROGRAMS.parent)
    state = tmp_path / "var/lib/hetero-async"
    (state / "demo").mkdir()
    replace_program(tmp_path / "opt/hetero-async/current", '#!/bin/sh\necho "$PWD" "$@"\n')
    typed = [tmp_path / "usr/local/bin/hetero-async-in", "demo", "hetero-async", "keys", "allow", "a$b"]
    told = subprocess.run(
        typed, env={**os.environ, "HETERO_ASYNC_STATE": str(state)}, capture_output=True, text=True, check=True
    )
    assert told.stdout == f"{state}/demo keys allow a$b\n"


# --- a site under Slurm, with programs in the place of Slurm's and of the workers ---

WORKERS = """#!/bin/sh
echo "$@" >{heard}
trap 'echo told to stop >>{heard}; exit {stopped}' TERM
touch {heard}.begun
[ {ends} = never ] || exit {ends}
while :; do sleep 0.05; done
"""


@pytest.mark.parametrize(
    ("ends", "stopped", "is_requeued"),
    [
        ("0", 0, False),  # the run is over
        ("1", 0, True),
        ("2", 0, False),  # run.toml is wrong
        ("never", 0, True),  # preempted: the workers have ended well
        ("never", 1, True),
    ],
)
def test_a_slurm_job_is_queued_again_unless_the_run_is_over(
    tmp_path: Path, ends: str, stopped: int, is_requeued: bool
) -> None:
    heard, programs = tmp_path / "heard", tmp_path / "bin"
    programs.mkdir()
    for name, text in (
        ("hetero-async", WORKERS.format(heard=heard, ends=ends, stopped=stopped)),
        ("scontrol", f'#!/bin/sh\necho "$@" >{heard}.scontrol\n'),
    ):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    job = [DEPLOY / "slurm/site.sbatch", "python", "train.py"]
    variables = {"PATH": path, "RUN": "/shared/big", "SITE": "cluster", "SLURM_JOB_ID": "7"}
    with background(tmp_path / "job.output", "bash", *job, **variables) as batch:
        until(Path(f"{heard}.begun").exists, "the workers have begun", SECONDS_MAX, str)
        if ends == "never":
            batch.send_signal(signal.SIGTERM)
        code = batch.wait(SECONDS_MAX)
    assert heard.read_text().splitlines()[0] == "work --run /shared/big/run.toml --site cluster -- python train.py"
    assert ("told to stop" in heard.read_text()) == (ends == "never")
    assert code == (stopped if ends == "never" else int(ends))
    requeued = Path(f"{heard}.scontrol")
    assert (requeued.read_text() if requeued.exists() else "") == ("requeue 7\n" if is_requeued else "")
