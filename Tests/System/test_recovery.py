"""What administrators decide when replicas or the metadata store are lost, with the whole control
plane: controller, node agents, storagectl. Skipped where only the data plane was built."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import tempfile

from harness.cluster import BINARIES, MIB, wait_for
from harness.context import SkipTest

SIZE = 64 * MIB
BLOCK = 4096


class Plane:
    """A cluster of three nodes on this host."""

    def __init__(self, context):
        if not (BINARIES / "storagectl").exists():
            raise SkipTest("storagectl is not built")
        self.directory = pathlib.Path(tempfile.mkdtemp(
            prefix="hr-", dir=os.environ.get("HAPTERA_TEST_DIR", "/var/tmp")))
        self.environment = {
            **os.environ, "HAPTERA_IO": context.backend, "HAPTERA_BIN_DIR": str(BINARIES),
            "XDG_CONFIG_HOME": str(self.directory / "config")}
        self.environment.pop("HAPTERA_SERVER", None)
        self.random = random.Random(context.seed)

    def __enter__(self):
        self.up()
        return self

    def __exit__(self, *failure):
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)

    def up(self):
        self.run("cluster", "up", "--dir", str(self.directory / "c"), "--nodes", "3")

    def run(self, *words, fails=False):
        done = subprocess.run(
            [BINARIES / "storagectl", *words, "-o", "json"], env=self.environment,
            capture_output=True, text=True, timeout=120)
        if fails:
            assert done.returncode != 0, (words, done.stdout)
            return done.stderr
        assert done.returncode == 0, (words, done.stderr, done.stdout)
        return json.loads(done.stdout)

    def volume(self):
        return self.run("volume", "show", "vol")

    def replicas(self):
        return {replica["node"]: replica for replica in self.volume()["replicas"]}

    def until(self, what, condition):
        return wait_for(lambda: condition(self.volume()), what)

    def pids(self):
        """Processes that have the cluster's directory in their arguments."""
        found = []
        for entry in pathlib.Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                pid = int(entry.name)
                if f"{self.directory}/c".encode() in (entry / "cmdline").read_bytes():
                    found.append(pid)
        return found

    def daemon(self, name):
        return json.loads((self.directory / "c" / f"{name}.pid").read_text())["identity"]["pid"]

    def kill(self, pid):
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not alive(pid), f"process {pid} to end")

    def image(self, size=SIZE):
        path = self.directory / "image"
        path.write_bytes(self.random.randbytes(size))
        return path

    def write(self, path, offset=0):
        """Written and flushed."""
        length = path.stat().st_size
        subprocess.run(
            ["qemu-io", "-f", "raw", "-c", f"write -s {path} {offset} {length}", "-c", "flush",
             self.volume()["engine"]["uri"]],
            check=True, capture_output=True, timeout=120)

    def read(self):
        path = self.directory / "copy"
        path.unlink(missing_ok=True)
        subprocess.run(
            ["nbdcopy", self.volume()["engine"]["uri"], path], check=True, timeout=120)
        return path.read_bytes()


def alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


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
        path = plane.image()
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
        assert after["epoch"] == before["epoch"]
        assert plane.read() == expected

        plane.run("volume", "detach", "vol")
        lose_store(plane)
        plane.run("store", "reconstruct", "--from-nodes", "--yes")
        plane.run("volume", "attach", "vol")
        plane.until("all replicas", lambda v: v["robustness"] == "healthy")
        assert plane.read() == expected


def test_store_restored_from_an_old_backup(context):
    with Plane(context) as plane:
        plane.run("volume", "create", "vol", "--size", str(SIZE))
        store = plane.directory / "c" / "controller"
        plane.kill(plane.daemon("controller"))
        shutil.copytree(store, plane.directory / "backup")
        plane.up()
        plane.run("volume", "attach", "vol")
        path = plane.image()
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
        path = plane.image()
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
