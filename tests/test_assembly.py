"""What is put together so that one part's failure is not another's."""

from pathlib import Path

import pytest
import trio
from shell.place import Notes, run

from hetero_async import assembly
from hetero_async.shell.admin import NotServing, ask, open_admin


def test_a_verb_that_crashes_is_told_of_and_the_next_question_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "OPERATOR_BACKOFF_SECONDS", 0.01)
    notes = Notes()
    crashes = iter([True, True, False])

    def status() -> str:
        assert not next(crashes), "a belief that does not hold"
        return "training"

    async def main() -> None:
        with open_admin(tmp_path / "admin") as listener:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(assembly._answer_operator, listener, {"status": status}, notes)
                for _ in range(2):
                    with pytest.raises(NotServing):
                        await ask(tmp_path / "admin", "status")
                assert await ask(tmp_path / "admin", "status") == "training"
                nursery.cancel_scope.cancel()

    run(main)
    reports = [str(fields["report"]) for fields in notes.of("crash")]
    assert len(reports) == 2 and all("operator's socket crashed" in report for report in reports)
