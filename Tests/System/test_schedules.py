"""Schedules over the whole control plane: real minutes pass."""

import time

from harness.cluster import MIB, wait_for
from harness.context import once
from harness.plane import Plane

SIZE = 16 * MIB
# To the next minute, and what the machine takes.
MINUTE = 90


def names(plane, *words):
    return [s["name"] for s in plane.run("snapshot", "list", "vol", *words)]


def runs(plane, schedule="often"):
    return {run["volume"]: run for run in plane.run("schedule", "show", schedule)["runs"]}


def check_scrubs(plane):
    """Every volume has a replica on each node: one scrub ended before the other was begun."""
    scrubs = [e for e in plane.run("events", "--limit", "500") if e["kind"].startswith("Scrub")]
    assert [e["kind"] for e in scrubs[:6]] == ["ScrubRequested", "ScrubFinished"] * 3, scrubs
    asked = [e for e in scrubs if e["kind"] == "ScrubRequested"]
    wanted = {"volume/vol", "volume/other", "volume/away"}
    assert {e["subject"] for e in asked} == wanted, asked
    assert {e["actor"] for e in asked} == {"schedule/scrubs"}, asked


@once
def test_schedules(context):
    """Two minutes of snapshots, one kept, and scrubs; the controller is killed in between."""
    with Plane(context) as plane:
        (weekly,) = plane.run("schedule", "list")
        assert weekly["name"] == "weekly-scrub" and weekly["all"] and weekly["next"], weekly
        assert plane.run("schedule", "pause", "weekly-scrub")["next"] is None
        plane.run("schedule", "delete", "weekly-scrub")
        for name, label in (("vol", "app=db"), ("away", "app=db"), ("other", "app=web")):
            plane.run("volume", "create", name, "--size", str(SIZE), "--label", label)
        for name in ("vol", "other"):
            plane.run("volume", "attach", name)
        plane.write(plane.image(SIZE))
        plane.run("snapshot", "create", "vol", "mine", "--label", "kept=yes")
        assert "by the controller only" in plane.run(
            "snapshot", "create", "vol", "no", "--label", "haptera.io/schedule=often", fails=True)
        create = ("schedule", "create", "often", "--cron", "* * * * *", "--snapshot", "--retain",
                  "1", "--selector", "app=db")
        made = plane.run(*create)
        assert plane.run(*create)["created"] == made["created"]

        plane.run("schedule", "create", "scrubs", "--cron", "* * * * *", "--scrub", "--all")

        begun = time.monotonic()
        wait_for(lambda: len(names(plane)) > 1, "the first snapshot", MINUTE)
        mine, first = plane.run("snapshot", "list", "vol")
        assert mine["labels"] == {"kept": "yes"}, mine
        assert first["labels"] == {"haptera.io/schedule": "often"}, first
        assert first["name"].startswith("often-20"), first
        # The one that is not attached gets an engine for it.
        wait_for(lambda: [run["state"] for run in runs(plane, "scrubs").values()] == ["done"] * 3,
                 "the scrubs", MINUTE)
        plane.run("schedule", "delete", "scrubs")
        check_scrubs(plane)
        plane.kill(plane.daemon("controller"))
        plane.up()
        assert {"mine", first["name"]} <= set(names(plane))
        wait_for(lambda: len(names(plane)) == 2 and first["name"] not in names(plane),
                 "the second snapshot, and the end of the first", MINUTE)
        waited = time.monotonic() - begun
        second = names(plane, "--selector", "haptera.io/schedule=often")
        assert names(plane) == ["mine", *second] and second > [first["name"]]

        def ended():
            """Both: each is noted by itself, and until then is what it was in the run before."""
            state = runs(plane)
            return (state["vol"]["state"] == state["away"]["state"] == "done"
                    and "has not changed" in (state["away"]["reason"] or "") and state)
        state = wait_for(ended, "their end to be noted")
        plane.run("schedule", "pause", "often")
        assert set(state) == {"vol", "away"}, state
        # It is not attached: one snapshot of what it holds, and no other while that stays so.
        (only,) = plane.run("snapshot", "list", "away")
        assert state["away"]["reason"].endswith(f"has not changed since '{only['name']}'"), state
        assert plane.run("volume", "show", "away")["state"] == "detached"
        assert plane.run("snapshot", "list", "other") == []
        events = plane.run("events", "--limit", "500")
        taken = [e["message"] for e in events if e["kind"] == "SnapshotCreated"]
        assert len(taken) == 4, taken
        skipped = [e for e in events if e["kind"] == "ScheduleVolumeSkipped"
                   and e["subject"] == "schedule/often"]
        assert len(skipped) == 1 and "'away'" in skipped[0]["message"], skipped
        asked = {e["actor"] for e in events if e["kind"] == "SnapshotDeletionRequested"}
        assert asked == {"schedule/often"}, asked
        kinds = {e["kind"] for e in events}
        wanted = {"ScheduleCreated", "ScheduleDeleted", "SchedulePaused", "ScheduleRunStarted"}
        assert wanted <= kinds, wanted - kinds

        plane.run("schedule", "create", "later", "--cron", "@monthly", "--time-zone",
                  "Europe/Berlin", "--scrub", "--volume", "vol")
        assert "Nowhere" in plane.run("schedule", "create", "x", "--cron", "@daily", "--time-zone",
                                      "Europe/Nowhere", "--scrub", "--all", fails=True)
        later = plane.run("schedule", "update", "later", "--cron", "@weekly", "--pause")
        assert later["cron"] == "@weekly" and later["paused"] and later["volumes"] == ["vol"], later
        assert "cannot be changed" in plane.run("schedule", "update", "later", "--snapshot",
                                                fails=True)
        labels = plane.run("snapshot", "label", "vol", "mine", "kept-", "app=db")["labels"]
        assert labels == {"app": "db"}, labels
        assert names(plane, "--selector", "app in (db,x),haptera.io/schedule notin (often)") == [
            "mine"]
        plane.run("schedule", "delete", "often")
        assert names(plane) == ["mine", *second]
        return f"{waited:.0f} s of schedule"
