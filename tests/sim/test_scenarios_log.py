"""A log that is torn, flipped, cut, exchanged, old or misplaced: nothing acknowledged is lost, and nobody guesses."""

import re
import shutil
from pathlib import Path

from sim.logs import (
    copy_of,
    flip,
    record_headers,
    refusal,
    restore_older_log,
    segments,
    start_and_halt,
    start_on,
    train_and_stop,
)
from sim.scenario import ScriptedWorld, make_plan, run

from hetero_async.core.messages import Ack
from hetero_async.formats.segment import RECORD_HEADER_BYTES, SEGMENT_HEADER_BYTES
from hetero_async.looking import verify_directory
from hetero_async.shell.outbox import ACKNOWLEDGED
from hetero_async.sim.disk import SECTOR_BYTES
from hetero_async.sim.plan import SERVER

# A log is damaged at every so many bytes: a prime, so that every field of a record is hit.
STRIDE = 37
EXCHANGED = "does not continue the segment before it: one is missing or exchanged"


def test_35_a_torn_append_is_cut_off_kept_aside_and_its_delta_is_sent_again(tmp_path: Path) -> None:
    seqs: list[int] = []

    async def script(world: ScriptedWorld) -> None:
        for share in (0.01, 0.2, 0.5, 0.8, 0.99):
            arrived: list[bytes] = []

            def tear(whole: bytes, share: float = share, arrived: list[bytes] = arrived) -> int | None:
                for seq, (_, payload) in world.judge.account("w0").saved.items():
                    if payload in whole and not arrived:
                        seqs.append(seq)
                        arrived.append(whole[: int(share * len(whole))])
                        return len(arrived[0])
                return None

            world.disk.tear = tear
            await world.until(lambda arrived=arrived: arrived, "an append with a delta of w0 is torn")
            starts = len(world.noted.recoveries[SERVER])
            await world.until(lambda starts=starts: len(world.noted.recoveries[SERVER]) > starts, "the server is back")
            await world.until(lambda: world.is_served_by(SERVER), "it serves")
            lsn = world.noted.recoveries[SERVER][-1][0] + 1
            torn = world.serving.log.torn
            assert f"of the unfinished record {lsn} (" in torn
            assert "it was never acknowledged" in torn
            aside = max(world.log.glob("*.torn-*"), key=lambda path: int(path.name.split("-")[-1]))
            assert f"kept as {aside.name}" in torn
            assert aside.name.endswith(f".torn-{lsn}")
            assert arrived[0].rstrip(b"\0").endswith(aside.read_bytes())
            await world.until(lambda: world.answers("w0", Ack, seq=seqs[-1]), "the delta is acknowledged after all")

    world = run(make_plan(samples=300), tmp_path, script)
    assert len({*seqs}) == 5
    assert world.lives(SERVER) == 6


def test_35_a_log_cut_at_any_byte_of_its_last_record_ends_before_it(tmp_path: Path) -> None:
    ends: list[tuple[int, int]] = []

    async def script(world: ScriptedWorld) -> None:
        await train_and_stop(world, 2)
        (segment,) = segments(world.log)
        whole = segment.read_bytes()
        offset, last = record_headers(segment)[-1]
        for arriving in range(1, len(whole[offset:].rstrip(b"\0"))):
            damaged = copy_of(world.log)
            (damaged / segment.name).write_bytes(whole[: offset + arriving])
            assert start_on(damaged) == last.lsn - 1
            (aside,) = damaged.glob("*.torn-*")
            assert aside.name == f"{segment.name}.torn-{last.lsn}"
            assert aside.read_bytes() == whole[offset : offset + arriving].rstrip(b"\0")
            ends.append((arriving, last.lsn))

    run(make_plan(samples=60), tmp_path, script)
    assert len(ends) > RECORD_HEADER_BYTES


def test_37_a_flipped_bit_in_the_log_is_named_and_no_server_goes_on(tmp_path: Path) -> None:
    halts: list[str] = []

    async def script(world: ScriptedWorld) -> None:
        await train_and_stop(world, 3)
        (segment,) = segments(world.log)
        headers = record_headers(segment)
        durable_lsn = headers[-1][1].durable_lsn
        assert 0 < len(headers) - durable_lsn < 10, "the last append is all that was not known as durable"
        for offset, header in headers:
            for at in range(offset + offset % STRIDE, offset + header.padded_bytes, STRIDE):
                damaged = copy_of(world.log)
                flip(damaged / segment.name, at)
                if header.lsn <= durable_lsn:
                    halts.append(refusal(damaged))
                    assert halts[-1].startswith(f"{segment.name}: offset {offset}: record {header.lsn}: ")
                else:
                    assert start_on(damaged) >= durable_lsn
        for at in range(0, SEGMENT_HEADER_BYTES, STRIDE):
            damaged = copy_of(world.log)
            flip(damaged / segment.name, at)
            halts.append(refusal(damaged))
            assert halts[-1].startswith(f"{segment.name}: offset 0: ")
        world.disk.flip_bit(segment, headers[durable_lsn][0])
        world.disk.cut_power()  # it is the medium that is damaged, which no power cut mends
        await start_and_halt(world)

    world = run(make_plan(), tmp_path, script)
    assert len(halts) > 100
    assert world.lives(SERVER) == 2
    assert ": offset " in world.halt


def test_38_a_missing_exchanged_foreign_or_older_segment_halts(tmp_path: Path) -> None:
    refusals: dict[str, str] = {}
    names: list[str] = []
    older: list[str] = []

    async def stop(world: ScriptedWorld) -> None:
        await train_and_stop(world, 5)
        world.stop()

    foreign = run(make_plan(seed=2, segment_bytes=2048), tmp_path / "foreign", stop)

    async def script(world: ScriptedWorld) -> None:
        await world.until(lambda: len(world.deltas("w0")) == 2, "w0 has trained a while")
        newest = segments(world.log)[-1]
        kept = newest.read_bytes()
        older.append(newest.name)
        await train_and_stop(world, 5)
        names.extend(segment.name for segment in segments(world.log))
        assert len(names) >= 4
        assert names[1] < older[0] < names[-1]

        damaged = copy_of(world.log)
        (damaged / names[1]).unlink()
        refusals["missing"] = refusal(damaged)
        damaged = copy_of(world.log)
        (damaged / names[0]).unlink()
        refusals["first missing"] = refusal(damaged)
        damaged = copy_of(world.log)
        first, second = (damaged / name for name in names[1:3])
        first.rename(damaged / "between")
        second.rename(first)
        (damaged / "between").rename(second)
        refusals["exchanged"] = refusal(damaged)
        damaged = copy_of(world.log)
        shutil.copy(foreign.log / names[0], damaged / names[0])
        refusals["foreign"] = refusal(damaged)
        damaged = copy_of(world.log)
        (damaged / older[0]).write_bytes(kept)
        refusals["older"] = refusal(damaged)

        (world.log / older[0]).write_bytes(kept)
        await start_and_halt(world)

    world = run(make_plan(segment_bytes=2048), tmp_path, script)
    assert refusals == {
        "missing": f"{names[2]}: {EXCHANGED}",
        "first missing": f"the log: begins at record {int(names[1][:20])}, record 1 is missing",
        "exchanged": f"{names[1]}: offset 0: begins at record {int(names[2][:20])}, its name says otherwise",
        "foreign": f"{names[1]}: {EXCHANGED}",
        "older": f"{names[names.index(older[0]) + 1]}: {EXCHANGED}",
    }
    assert world.halt.endswith(refusals["older"])


def test_38_an_older_copy_of_the_newest_segment_halts_when_a_checkpoint_knows_of_more(tmp_path: Path) -> None:
    async def script(world: ScriptedWorld) -> None:
        await restore_older_log(world)
        await start_and_halt(world)

    world = run(make_plan(checkpoint_every=1), tmp_path, script)
    newest = max(int(path.name) for path in (world.disk.root / "checkpoints").glob("[0-9]*"))
    assert f"{newest} was read as the last record, the log ends at " in world.halt


def test_38_an_older_copy_of_the_newest_segment_halts_when_a_worker_has_been_told_of_more(tmp_path: Path) -> None:
    """The log's own bytes cannot tell an older copy of its end from its end; the workers hold receipts from beyond."""

    async def script(world: ScriptedWorld) -> None:
        await restore_older_log(world)
        world.judge.disk_lost(SERVER)
        known = len(world.lines)
        world.release(SERVER)
        await world.until(lambda: any("recovered" in line for line in world.lines[known:]), "it goes on from the copy")
        world.must_halt = True
        await world.until(lambda: False, "the server halts")

    world = run(make_plan(), tmp_path, script)
    assert re.search(r"w0 has our word that its delta \d+ is durable, and this log ends with its delta 3", world.halt)


def test_38_an_older_copy_of_the_newest_segment_is_found_by_verify_from_the_workers_notes(tmp_path: Path) -> None:
    lost: list[tuple[str, int]] = []
    noted: list[int] = []

    async def script(world: ScriptedWorld) -> None:
        await restore_older_log(world)
        notes = world.disks["w0"].root / "outbox" / ACKNOWLEDGED
        noted.append(len(notes.read_text().splitlines()))
        (world.log.parent / "workers" / "w0").mkdir(parents=True)
        shutil.copy(notes, world.log.parent / "workers" / "w0" / ACKNOWLEDGED)
        verdict = verify_directory(world.log, lambda _: None)
        assert not verdict.is_ok
        lost.extend(verdict.lost)
        world.stop()

    run(make_plan(), tmp_path, script)
    assert lost == [("w0", seq) for seq in range(4, noted[0] + 1)]


def test_40_a_misdirected_write_is_found(tmp_path: Path) -> None:
    astray_at: list[int] = []

    async def script(world: ScriptedWorld) -> None:
        await world.until(lambda: len(world.deltas("w0")) == 3, "w0 has trained a while")
        world.disk.misdirected_bytes = 1000
        await world.until(lambda: not world.disk.misdirected_bytes, "a write has gone astray")
        astray_at.append(len(world.noted.entries) + 1)
        await train_and_stop(world, 5)
        await start_and_halt(world)

    world = run(make_plan(), tmp_path, script)
    offset, _, record = world.halt.split("offset ")[1].partition(": record ")
    (segment,) = segments(world.log)
    whole = record_headers(segment)
    # They fell on a header, which is not read as one then, or on a body.
    places = {header.lsn: at for at, header in whole} | {len(whole) + 1: whole[-1][0] + whole[-1][1].padded_bytes}
    lsn = int(record.split(":")[0])
    assert int(offset) == places[lsn]
    assert lsn <= astray_at[0], "it names the first record that the astray bytes fell on"


def test_40_a_sector_that_was_never_written_is_found(tmp_path: Path) -> None:
    refusals: list[str] = []

    async def script(world: ScriptedWorld) -> None:
        await train_and_stop(world, 5)
        (segment,) = segments(world.log)
        headers = record_headers(segment)
        durable_bytes = headers[headers[-1][1].durable_lsn][0]
        for start in range(0, durable_bytes, SECTOR_BYTES):
            damaged = copy_of(world.log)
            stale = bytearray(segment.read_bytes())
            stale[start : min(start + SECTOR_BYTES, durable_bytes)] = bytes(min(SECTOR_BYTES, durable_bytes - start))
            (damaged / segment.name).write_bytes(stale)
            refusals.append(refusal(damaged))
        world.stop()

    run(make_plan(), tmp_path, script)
    assert len(refusals) > 10
    assert all(": offset " in found for found in refusals)
