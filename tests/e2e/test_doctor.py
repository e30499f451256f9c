"""The doctor on the hosts of a real run: before its server runs, beside a worker at work, and where all is wrong."""

import json
import os
from pathlib import Path
from typing import Any

from e2e.harness import Run, forked

from hetero_async.core.records import Joined
from hetero_async.doctor.network import begins_slowly
from hetero_async.shell.keys import AllowList, load_public

SAMPLES = 1600


def examined(tmp_path: Path, run: Run, exit_code: int) -> dict[str, list[dict[str, Any]]]:
    """By subject."""
    answer = forked(tmp_path, "doctor", "--run", run.config.path, "--json", "--parameters", 6400)
    assert answer.exit_code == exit_code, answer.output + answer.errors
    found: dict[str, list[dict[str, Any]]] = {}
    for finding in json.loads(answer.output)["findings"]:
        found.setdefault(finding["subject"], []).append(finding)
    return found


def test_a_worker_at_work_is_not_disturbed_and_the_rate_is_measured_with_the_key_of_another(tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    with Run(tmp_path / "run", workers=2, samples=SAMPLES) as run:
        run.start_server()
        run.start_worker("here-0", hold=str(hold), hold_after=20)
        run.wait(Path(f"{hold}.reached-here-0").exists, "a worker at work")
        found = examined(tmp_path, run, 0)
        assert {finding["state"] for finding in found["link to server"]} == {"ok"}
        assert "Mbit/s" in found["rate from server"][0]["told"]
        assert "held by it" in found["ports of server"][0]["told"]
        assert found["arithmetic"][0]["state"] == "ok"
        assert "all codecs code as on a CPU" in found["device cpu"][0]["told"]
        hold.unlink()
        run.finish(run.lives[1])
        assert len(run.records(Joined)) == 1  # it never had to join anew


def test_what_is_wrong_is_named_with_what_to_do(tmp_path: Path) -> None:
    with Run(tmp_path / "run", workers=2, witness={"etcd": ["http://127.0.0.1:9"]}) as run:
        keys = run.config.keys
        (keys / "here-0.secret").chmod(0o644)
        AllowList(keys / "allowed.json").revoke(load_public(keys / "here-1.public"))
        os.remove(keys / "operator.public")
        found = examined(tmp_path, run, 1)
        assert "do: chmod 600" in found["key of here-0"][0]["told"]
        assert "hetero-async keys allow" in found["key of here-1"][1]["told"]
        assert [finding["state"] for finding in found["key of operator"]] == ["ok"]
        assert [finding["state"] for finding in found["ports of server"]] == ["ok", "ok"]
        assert "link to server" not in found  # it does not run yet, and it is this host's own
        assert [finding["state"] for finding in found["witness"]] == ["warning", "failed"]
        assert "no majority" in found["witness"][1]["told"]


def test_a_link_on_which_tcp_begins_slowly_is_named_where_it_is_long(tmp_path: Path) -> None:
    setting, control = tmp_path / "tcp_slow_start_after_idle", tmp_path / "tcp_congestion_control"
    assert list(begins_slowly("server", 0.2, tmp_path)) == [], "the kernel does not say"
    setting.write_text("1\n")
    control.write_text("cubic\n")
    [finding] = begins_slowly("server", 0.2, tmp_path)
    assert (finding.subject, finding.state) == ("TCP to server", "warning")
    assert "sysctl -w net.ipv4.tcp_slow_start_after_idle=0" in finding.told
    assert list(begins_slowly("server", 0.01, tmp_path)) == [], "near"
    for path, content in ((control, "bbr\n"), (setting, "0\n")):
        before = path.read_text()
        path.write_text(content)
        assert list(begins_slowly("server", 0.2, tmp_path)) == []
        path.write_text(before)
