"""What administrators decide when replicas or the metadata store are lost, with the whole control
plane: controller, node agents, storagectl."""

import os
import pathlib
import shutil
import signal
import subprocess

from harness.cluster import MIB, wait_for
from harness.plane import Plane

SIZE = 64 * MIB
BLOCK = 4096


def lose_store(plane):
    plane.kill(plane.daemon("controller"))
    for path in (plane.directory / "c" / "controller").iterdir():
        path.unlink()
    plane.up()


def test_store_lost(context):
    """Volumes, attached or not, are found again on the nodes; an engine that outlived the store
    goes on."""
    with Plane(context) as plane:
        plane.run("volume", "create", "vol", "--size", str(SIZE))
        plane.run("volume", "attach", "vol")
        path = plane.image(SIZE)
        plane.write(path)
        expected = path.read_bytes()
        before = plane.volume()

        lose_store(plane)
        assert plane.run("volume", "list") == []
        found = plane.run("store", "reconstruct", "--from-nodes")["volumes"]
        assert [volume["safe"] for volume in found] == [True], found
        assert plane.run("volume", "list") == [], "a look changed something"
        plane.run("store", "reconstruct", "--from-nodes", "--yes")
        after = plane.until("the engine to be known", lambda v: v["robustness"] == "healthy" and v)
        assert after["engine"]["pid"] == before["engine"]["pid"], "the engine was disturbed"
        assert after["epoch"] == before["epoch"], plane.run("volume", "why", "vol")
        assert plane.read() == expected

        plane.run("volume", "detach", "vol")
        lose_store(plane)
        plane.run("store", "reconstruct", "--from-nodes", "--yes")
        plane.run("volume", "attach", "vol")
        plane.until("all replicas", lambda v: v["robustness"] == "healthy")
        assert plane.read() == expected


def test_store_lost_with_a_node(context):
    """A replica had left a volume that nobody writes to: soon its node is not missed."""
    with Plane(context) as plane:
        plane.run("volume", "create", "vol", "--size", str(SIZE))
        plane.run("volume", "attach", "vol", "--node", "node-1")
        plane.until("all replicas", lambda v: v["robustness"] == "healthy")
        lost = plane.replicas()["node-3"]["pid"]
        plane.kill(plane.daemon("node-3"))
        plane.kill(lost)
        plane.until("the removal", lambda v: v["robustness"] == "degraded")
        (plane.cluster / "node-3").rename(plane.directory / "node-3")
        lose_store(plane)

        # Its status says whether the record is one to take without --force.
        wait_for(lambda: plane.start("store", "reconstruct", "--from-nodes").wait() == 0,
                 "a certain record")
        plane.run("store", "reconstruct", "--from-nodes", "--yes")
        plane.until("the engine", lambda v: v["robustness"] == "degraded" and v["engine"])


def test_store_restored_from_an_old_backup(context):
    with Plane(context) as plane:
        plane.run("volume", "create", "vol", "--size", str(SIZE))
        store = plane.directory / "c" / "controller"
        plane.kill(plane.daemon("controller"))
        shutil.copytree(store, plane.directory / "backup")
        plane.up()
        plane.run("volume", "attach", "vol")
        path = plane.image(SIZE)
        plane.write(path)
        plane.run("volume", "detach", "vol")
        plane.kill(plane.daemon("controller"))
        shutil.rmtree(store)
        shutil.copytree(plane.directory / "backup", store)
        plane.up()
        # An engine finds replicas that have promised more than its record says.
        plane.run("volume", "attach", "vol", "--timeout", "5", fails=True)
        plane.run("store", "reconstruct", "--volume", "vol", "--yes")
        plane.run("volume", "attach", "vol")
        assert plane.read() == path.read_bytes()


def test_salvage(context):
    """Both members are lost; the third copy, which left before the last writes, is chosen."""
    with Plane(context) as plane:
        plane.run("volume", "create", "vol", "--size", str(SIZE))
        plane.run("volume", "attach", "vol", "--node", "node-3")
        path = plane.image(SIZE)
        plane.write(path)
        expected = path.read_bytes()
        survivor = plane.replicas()["node-3"]
        os.kill(survivor["pid"], signal.SIGSTOP)
        start, later = 8 * MIB, plane.image(2 * MIB)
        plane.write(later, offset=start)
        later = later.read_bytes()
        assert plane.replicas()["node-3"]["inSync"] is False
        assert "can be reached" in plane.run(
            "volume", "salvage", "vol", "--replica", survivor["id"], "--yes", fails=True)

        lost = [plane.replicas()[node] for node in ("node-1", "node-2")]
        for node in ("node-1", "node-2"):
            plane.kill(plane.daemon(node))
        # The first is taken out of the in-sync set; the second is all that is left of it.
        plane.kill(lost[0]["pid"])
        plane.until("the first loss", lambda v: any(
            r["id"] == lost[0]["id"] and not r["inSync"] for r in v["replicas"]))
        plane.kill(lost[1]["pid"])
        os.kill(survivor["pid"], signal.SIGCONT)
        plan = wait_for(
            lambda: (lambda p: p["objection"] is None and p)(
                plane.run("volume", "salvage", "vol")), "the nodes to be missed")
        assert [choice["id"] for choice in plan["choices"] if not choice["problem"]] == [
            survivor["id"]]
        assert plan["choices"][0]["lostFromEpoch"] > 1
        why = plane.run("volume", "why", "vol")
        assert why["choices"] == plan["choices"]
        assert lost[1]["id"] in why["waitsFor"]
        # Not without a word.
        plane.run("volume", "salvage", "vol", "--replica", survivor["id"], fails=True)

        plane.run("volume", "salvage", "vol", "--replica", survivor["id"], "--yes")
        plane.until("service", lambda v: v["robustness"] == "degraded" and v["engine"]["pid"])
        wait_for(lambda: readable(plane), "the volume to be readable")
        # What was on its way to the copy when it was cut off may have reached it.
        found = plane.read()
        for at in range(0, SIZE, BLOCK):
            block, old = found[at:at + BLOCK], expected[at:at + BLOCK]
            assert block == old or start <= at < start + len(later) and \
                block == later[at - start:at - start + BLOCK], f"offset {at}"

        # The losers return, and stay as they are until somebody decides.
        plane.up()
        wait_for(
            lambda: all(plane.replicas()[n]["pid"] for n in ("node-1", "node-2")), "the losers")
        away = {r["id"]: r["kept"] for r in plane.run("volume", "why", "vol")["away"]}
        assert away == {replica["id"]: True for replica in lost}, away
        plane.run("replica", "rejoin", "vol", lost[0]["id"], "--yes")
        plane.until("it to be filled", lambda v: any(
            r["id"] == lost[0]["id"] and r["state"] == "inSync" for r in v["replicas"]))
        plane.run("replica", "delete", "vol", lost[1]["id"], "--discard-kept", "--yes")
        wait_for(
            lambda: not pathlib.Path(lost[1]["directory"]).exists(), "its data to be removed")
        assert plane.read() == found


def readable(plane):
    uri = plane.volume()["engine"]["uri"]
    return uri and subprocess.run(
        ["qemu-io", "-r", "-f", "raw", "-c", "read 0 4k", uri], capture_output=True,
        timeout=60).returncode == 0
