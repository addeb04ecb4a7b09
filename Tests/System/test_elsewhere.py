"""Clones on other nodes than their source's: shared there for a while, filled here."""

import json
import os
import random
import signal
import time

from harness.cluster import MIB, wait_for
from harness.plane import Plane
from test_clones import SIZE, Volumes, verify


def nodes_of(shown, temporary=False):
    return sorted(replica["node"] for replica in shown["replicas"]
                  if replica["temporary"] == temporary)


class Elsewhere:
    """A volume on node-1 that holds data in two layers, and what its snapshot is; clones of it on
    the other two nodes."""

    def __init__(self, plane, size=SIZE, replicas=1):
        self.plane, self.volumes = plane, Volumes(plane)
        chance = random.Random(plane.random.random())
        places = [word for number in range(replicas) for word in ("--node", f"node-{number + 1}")]
        self.volumes.create("vol", "--size", str(size), "--replicas", str(replicas), *places)
        plane.run("volume", "attach", "vol")
        self.volumes.write("vol", chance.randbytes(24 * MIB))
        plane.run("snapshot", "create", "vol", "lower")
        self.volumes.write("vol", chance.randbytes(8 * MIB), 20 * MIB)
        plane.run("snapshot", "create", "vol", "golden")
        self.golden = self.volumes.read("vol")
        plane.run("volume", "detach", "vol")

    def start(self, name, *nodes):
        places = [word for node in nodes for word in ("--node", node)]
        return self.plane.start("volume", "create", name, "--from", "vol@golden", *places)

    def slowed(self, name, *nodes):
        """Its creation, and it: what is to be filled is stopped, and the filling with it."""
        def stopped():
            for volume in self.plane.run("volume", "list"):
                if volume["name"] == name and volume["state"] == "detached" and all(
                        replica["pid"] for replica in volume["replicas"]):
                    self.pause(volume)
                    return volume
            return None

        for _ in range(5):
            command = self.start(name, *nodes)
            shown = wait_for(stopped, "the replicas")
            if self.volumes.show(name)["filling"]:
                return command, shown
            # Too late: this machine was busy.
            self.pause(shown, signal.SIGCONT)
            self.done(command)
            self.plane.run("volume", "delete", name)
        raise AssertionError("every clone was filled before its replicas were stopped")

    def done(self, command):
        output, errors = command.communicate(timeout=120)
        assert command.returncode == 0, (output, errors)
        return json.loads(output)

    def pause(self, shown, signal_number=signal.SIGSTOP):
        for replica in shown["replicas"]:
            if not replica["temporary"] and replica["pid"]:
                os.kill(replica["pid"], signal_number)

    def check(self, name, nodes):
        """Whole, where it was asked for, and nowhere else."""
        shown = self.volumes.show(name)
        assert shown["robustness"] == "healthy" and shown["filling"] is None, shown
        assert nodes_of(shown) == sorted(nodes) and not nodes_of(shown, True), shown
        directories = self.volumes.directories(name)
        known = {replica["id"] for volume in self.plane.run("volume", "list")
                 for replica in volume["replicas"]}
        wait_for(lambda: {path.name for path in self.plane.cluster.glob("*/replicas/*")} == known,
                 "what was shared to be removed", 30)
        return directories


def test_a_clone_elsewhere(context):
    """On no node of the source: it is there at once, filled with its snapshots without being
    attached, and what was shared meanwhile is gone. One that has a replica with the source is
    filled, too. Then it is independent."""
    with Plane(context) as plane:
        bench = Elsewhere(plane)
        begun = time.monotonic()
        shown = bench.done(bench.start("copy", "node-2", "node-3"))
        taken = time.monotonic() - begun
        assert shown["robustness"] == "healthy" and shown["filling"] is None, shown
        bench.check("copy", ["node-2", "node-3"])
        again = bench.done(bench.start("copy", "node-2", "node-3"))
        assert again["id"] == shown["id"], again
        begun = [e for e in plane.run("events", "--limit", "1000")
                 if e["kind"] == "MaintenanceBegun" and e["subject"] == "volume/copy"]
        assert len(begun) == 1, begun
        # Nothing is shared any more, and the source may go.
        assert not bench.volumes.files("vol").keys() & bench.volumes.files("copy").keys()
        bench.done(plane.start("volume", "create", "mixed", "--from", "vol@golden", "--replicas",
                               "2", "--node", "node-1", "--node", "node-3"))
        bench.check("mixed", ["node-1", "node-3"])
        plane.run("volume", "delete", "vol")
        for name in ("copy", "mixed"):
            plane.run("volume", "attach", name)
            assert bench.volumes.read(name) == bench.golden, name
            assert bench.volumes.read(name, "golden") == bench.golden, name
            bench.volumes.write(name, b"own" * 4096)
            plane.run("snapshot", "revert", name, "golden", "--keep", "changed", "--yes")
            assert bench.volumes.read(name) == bench.golden, name
        # Each copy by itself: the other one is not asked.
        for replica in bench.volumes.show("copy")["replicas"]:
            os.kill(replica["pid"], signal.SIGSTOP)
            assert bench.volumes.read("copy") == bench.golden, replica
            os.kill(replica["pid"], signal.SIGCONT)
            wait_for(lambda: bench.volumes.show("copy")["robustness"] == "healthy", "health", 60)
        for name in ("copy", "mixed"):
            plane.run("volume", "detach", name)
        directories = bench.volumes.directories("copy") + bench.volumes.directories("mixed")
        plane.kill_all()
        verify(directories)
        return f"filled in {taken:.1f} s"


def test_a_clone_that_is_used_while_it_is_filled(context):
    """It is attached at once, though every lasting replica is still to be filled, written, given
    snapshots, detached and reverted meanwhile: nothing is lost when what was shared goes. The
    command that made it ends when it is whole; one that was given up is repeated."""
    with Plane(context) as plane:
        bench = Elsewhere(plane)
        volumes, chance = bench.volumes, random.Random(context.seed)
        command, shown = bench.slowed("copy", "node-2", "node-3")
        try:
            begun = time.monotonic()
            plane.run("volume", "attach", "copy")
            attached = time.monotonic() - begun
            assert volumes.read("copy") == bench.golden
            mine = chance.randbytes(2 * MIB)
            volumes.write("copy", mine, 3 * MIB)
            plane.run("snapshot", "create", "copy", "meanwhile")
            now = volumes.show("copy")
            assert now["filling"]["replicasTotal"] == 2 and nodes_of(now, True) == ["node-1"], now
            text = plane.run("volume", "create", "copy", "--from", "vol@golden", "--node", "node-2",
                             "--node", "node-3", "--timeout", "5", fails=True)
            assert "its replicas are being filled" in text and "--timeout" in text, text
            temporary = next(r["id"] for r in now["replicas"] if r["temporary"])
            text = plane.run("replica", "delete", "copy", temporary, "--yes", fails=True)
            assert "is temporary" in text, text
            command.send_signal(signal.SIGINT)
            command.communicate(timeout=60)
            plane.run("volume", "detach", "copy")
        finally:
            bench.pause(shown, signal.SIGCONT)
        # Detached: reverted beside the filling, and attached again.
        plane.run("snapshot", "revert", "copy", "golden", "--keep", "mine", "--yes")
        plane.run("volume", "attach", "copy")
        assert volumes.read("copy") == bench.golden
        bench.done(bench.start("copy", "node-2", "node-3"))
        bench.check("copy", ["node-2", "node-3"])
        changed = bench.golden[:3 * MIB] + mine + bench.golden[5 * MIB:]
        assert volumes.read("copy", "meanwhile") == changed
        assert volumes.read("copy", "mine") == changed
        return f"attached in {attached:.2f} s"


def test_what_fails_while_a_clone_is_filled(context):
    """The controller is killed again and again; a node that shares dies for good; one that is
    filled dies and comes back; the clone is deleted. Whatever is left is whole."""
    with Plane(context) as plane:
        bench = Elsewhere(plane, size=128 * MIB, replicas=2)
        volumes, chance = bench.volumes, random.Random(context.seed)
        for turn in range(4):
            command = bench.start(f"c{turn}", "node-3")
            for _ in range(3):
                time.sleep(chance.random() * 0.8)
                plane.kill(plane.daemon("controller"))
                plane.up()
            bench.done(command)
            bench.check(f"c{turn}", ["node-3"])
        # The engine goes on where it is.
        command, shown = bench.slowed("copy", "node-3")
        assert nodes_of(shown, True) == ["node-1", "node-2"], shown
        victim = next(r for r in shown["replicas"] if r["temporary"])
        agent = plane.daemon(victim["node"])
        os.kill(agent, signal.SIGSTOP)
        os.kill(victim["pid"], signal.SIGKILL)
        lasting = next(r for r in shown["replicas"] if not r["temporary"])
        time.sleep(1)
        os.kill(lasting["pid"], signal.SIGKILL)
        try:
            wait_for(lambda: not volumes.show("copy")["filling"], "the filling", 60)
            assert volumes.show("copy")["robustness"] == "healthy"
            plane.run("volume", "attach", "copy", "--node", "node-3")
            assert volumes.read("copy")[:SIZE] == bench.golden[:SIZE]
            plane.run("volume", "detach", "copy")
        finally:
            os.kill(agent, signal.SIGCONT)
        bench.done(command)
        bench.check("copy", ["node-3"])
        command, shown = bench.slowed("gone", "node-3")
        plane.run("volume", "delete", "gone")
        output, errors = command.communicate(timeout=60)
        assert command.returncode != 0 and "was deleted meanwhile" in errors, (output, errors)
        assert not [d for d in plane.cluster.glob("*/replicas/*")
                    if d.name in {r["id"] for r in shown["replicas"]}]
        for turn in range(4):
            plane.run("volume", "attach", f"c{turn}")
            assert volumes.read(f"c{turn}") == bench.golden, turn
        return "4 clones under a controller that is killed"
