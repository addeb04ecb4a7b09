"""What only an engine can do, to volumes that are not attached: nobody can connect meanwhile, whoever
attaches is attached, and whatever dies leaves a volume that can be."""

import os
import pathlib
import random
import shutil
import signal
import statistics
import subprocess
import threading
import time

from harness.cluster import MIB, control, wait_for
from harness.context import once
from harness.plane import Plane, alive

SIZE = 16 * MIB


def words(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return [""]


def processes(plane, program):
    return [pid for pid in plane.pids() if words(pid)[0].endswith(program) and alive(pid)]


def engines(plane):
    return processes(plane, "haptera-engine")


def kinds(plane):
    return [event["kind"] for event in plane.run("events", "--limit", "1000")]


def attach(plane, *options):
    plane.run("volume", "attach", "vol", *options)
    return plane.read()


def detach(plane):
    assert plane.run("volume", "detach", "vol")["state"] == "detached"


def until_idle(plane):
    """No engine is left, and the last one has left in order."""
    wait_for(lambda: not engines(plane), "the engine to be gone", 30)
    wait_for(lambda: plane.volume()["reason"] is None, "the end to be noted", 30)


def last_change(plane):
    return plane.run("volume", "why", "vol")["changes"][-1]


def detached(plane):
    """A volume that has been written and is not attached; the image of what it holds."""
    plane.run("volume", "create", "vol", "--size", str(SIZE))
    image = plane.image(SIZE)
    attach(plane)
    plane.write(image)
    detach(plane)
    return image


class Watch(threading.Thread):
    """Looks at the engines that run: none lets a client of the volume in, only readers of snapshots.
    The volume is never shown attached."""

    def __init__(self, plane):
        super().__init__(daemon=True)
        self.plane, self.seen, self.wrong = plane, set(), []
        self.ends = threading.Event()
        self.start()

    def run(self):
        while not self.ends.wait(0.02):
            for pid in engines(self.plane):
                line = words(pid)
                if line == [""] or pid in self.seen:
                    continue
                self.seen.add(pid)
                if "--maintenance" not in line:
                    self.wrong.append(line)
                socket = line[line.index("--nbd-unix") + 1]
                for name in ("vol", ""):
                    asked = subprocess.run(
                        ["nbdinfo", "--size", f"nbd+unix:///{name}?socket={socket}"],
                        capture_output=True, text=True, check=False)
                    if asked.returncode == 0:
                        self.wrong.append(asked)
            if self.seen:
                volume = self.plane.volume()
                if volume["state"] != "detached" or volume["engine"] is not None:
                    self.wrong.append(volume)

    def stop(self):
        self.ends.set()
        self.join()
        assert self.seen and not self.wrong, (self.seen, self.wrong)


@once
def test_detached_volumes(context):
    """Snapshots, a revert, growth and deletions, with three replicas and with one; what it holds
    afterwards, how it was left, and how long it takes."""
    with Plane(context) as plane:
        plane.run("volume", "create", "vol", "--size", str(SIZE))
        contents = {}
        attach(plane)
        for name in ("a", "b"):
            image = plane.image(SIZE)
            contents[name] = image.read_bytes()
            plane.write(image)
            detach(plane)
            watch = Watch(plane)
            snapshot = plane.run("snapshot", "create", "vol", name, "--label", "app=db")
            assert snapshot["uri"] is None and snapshot["labels"] == {"app": "db"}, snapshot
            watch.stop()
            until_idle(plane)
            assert attach(plane) == contents[name]
        # Nothing was written since it was attached: that is not known, and does not matter.
        detach(plane)
        assert "choose another name" in plane.run(
            "snapshot", "revert", "vol", "a", "--keep", "b", "--yes", fails=True)
        kept = plane.run("snapshot", "revert", "vol", "a", "--keep", "kept", "--yes")
        assert kept["parent"] == "b", kept
        again = plane.run("snapshot", "revert", "vol", "a", "--keep", "kept", "--yes")
        # (What it takes may have been counted meanwhile.)
        assert all(again[key] == kept[key] for key in kept if not key.endswith("Bytes")), again
        assert plane.run("volume", "resize", "vol", str(2 * SIZE))["sizeBytes"] == 2 * SIZE
        plane.run("snapshot", "delete", "vol", "b", "--yes")
        assert "no snapshot" in plane.run("snapshot", "delete", "vol", "b", "--yes", fails=True)
        plane.run("volume", "create", "copy", "--from", "vol@kept")
        until_idle(plane)
        assert last_change(plane)["text"] == "detached, clean", last_change(plane)
        assert attach(plane) == contents["a"] + bytes(SIZE)
        assert [s["name"] for s in plane.run("snapshot", "list", "vol")] == ["a", "kept"]
        detach(plane)
        times = []
        for turn in range(10):
            begun = time.monotonic()
            plane.run("snapshot", "create", "vol", f"t{turn}")
            times.append(time.monotonic() - begun)
            until_idle(plane)
        assert plane.volume()["robustness"] == "healthy"

        plane.run("volume", "create", "single", "--size", str(SIZE), "--node", "node-2",
                  "--replicas", "1")
        plane.run("snapshot", "create", "single", "s")
        wait_for(lambda: not engines(plane), "the engine to be gone")
        changes = plane.run("volume", "why", "single")["changes"]
        assert [c["kind"] for c in changes] == ["creation", "takeover", "snapshot", "detach"], changes
        assert changes[1]["text"] == "engine without clients took over", changes
        assert changes[3]["text"] == "detached, clean", changes
        plane.run("volume", "attach", "single")
        seen = kinds(plane)
        assert seen.count("MaintenanceBegun") == seen.count("MaintenanceEnded"), seen
        return (f"a snapshot took {statistics.median(times):.2f} s in the median of {len(times)}, "
                f"{max(times):.2f} s at most")


@once
def test_attach_meanwhile(context):
    """Three snapshots and an attachment at the same time, at every offset: all succeed, on the node
    that was asked for. A detachment succeeds, and so does the deletion of the volume."""
    with Plane(context) as plane:
        plane.run("volume", "create", "vol", "--size", str(SIZE))
        image = plane.image(SIZE)
        attach(plane)
        plane.write(image)
        waits = []
        for turn in range(12):
            detach(plane)
            taking = [plane.start("snapshot", "create", "vol", f"s{turn}-{i}") for i in range(3)]
            time.sleep(turn * 0.08)
            if turn % 3 == 1:
                detach(plane)
            node = f"node-{turn % 3 + 1}"
            begun = time.monotonic()
            done = plane.run("volume", "attach", "vol", "--node", node)
            waits.append(time.monotonic() - begun)
            assert done["node"] == node and done["uri"], done
            assert plane.read() == image.read_bytes()
            for process in taking:
                output = process.communicate(timeout=120)
                assert process.returncode == 0, output
        detach(plane)
        assert len(plane.run("snapshot", "list", "vol")) == 36
        # An attachment that waits is given up.
        taking = plane.start("snapshot", "create", "vol", "last")
        wait_for(lambda: engines(plane), "its engine")
        attaching = plane.start("volume", "attach", "vol", "--node", "node-3")
        wait_for(lambda: plane.volume()["state"] == "attaching" or attaching.poll() is not None,
                 "the attachment to wait")
        detach(plane)
        for process in (taking, attaching):
            process.communicate(timeout=120)
        assert taking.returncode == 0
        if attaching.returncode == 0:  # It was quicker.
            detach(plane)
        until_idle(plane)
        assert plane.volume()["state"] == "detached"

        taking = [plane.start("snapshot", "create", "vol", f"end-{i}") for i in range(2)]
        wait_for(lambda: engines(plane), "their engine")
        assert plane.run("volume", "delete", "vol")["deleted"]
        for process in taking:
            error = process.communicate(timeout=120)[1]
            assert process.returncode == 0 or "deleted" in error or "no volume" in error, error
        assert plane.run("volume", "list") == [] and not engines(plane)
        return (f"attached after {statistics.median(waits):.2f} s in the median of {len(waits)}, "
                f"{max(waits):.2f} s at most")


@once
def test_controller_killed_meanwhile(context):
    """At ten moments: the command succeeds all the same, once, and nothing stays behind."""
    with Plane(context) as plane:
        image = detached(plane)
        chance = random.Random(context.seed)
        longest, doubts = 0.0, 0
        for turn in range(10):
            begun = time.monotonic()
            taking = plane.start("snapshot", "create", "vol", f"s{turn}")
            time.sleep(turn * 0.1 + chance.random() * 0.1)
            plane.kill(plane.daemon("controller"))
            plane.up()
            output = taking.communicate(timeout=120)
            if taking.returncode == 5:
                # It had been asked for, and nobody heard the answer.
                doubts += 1
                assert "it is not known whether" in output[1], output
                plane.run("snapshot", "create", "vol", f"s{turn}")
            else:
                assert taking.returncode == 0, output
            longest = max(longest, time.monotonic() - begun)
            until_idle(plane)
            assert plane.volume()["state"] == "detached"
        assert [s["name"] for s in plane.run("snapshot", "list", "vol")] == [
            f"s{turn}" for turn in range(10)]
        # One that nobody uses any more does not keep an attachment waiting.
        taking = plane.start("snapshot", "create", "vol", "last")
        wait_for(lambda: engines(plane), "its engine")
        plane.kill(plane.daemon("controller"))
        taking.kill()
        taking.communicate()
        plane.up()
        assert plane.run("volume", "attach", "vol", "--node", "node-2")["node"] == "node-2"
        assert plane.read() == image.read_bytes()
        return f"longest {longest:.1f} s, {doubts} in doubt"


@once
def test_node_lost_meanwhile(context):
    """The maintenance's engine with its node: killed, and then stopped and continued later, as cut
    off. Who wants to attach elsewhere is attached; the old engine can do no harm."""
    with Plane(context) as plane:
        plane.run("volume", "create", "vol", "--size", str(SIZE))
        attach(plane)
        image = plane.image(SIZE).read_bytes()
        plane.write(plane.directory / "image")
        detach(plane)
        waits, reverted = [], []
        for turn, signals in enumerate([signal.SIGKILL, signal.SIGSTOP]):
            base, kept = f"base-{turn}", f"kept-{turn}"
            plane.run("snapshot", "create", "vol", base)
            before, image = image, plane.image(SIZE).read_bytes()
            attach(plane)
            plane.write(plane.directory / "image")
            detach(plane)
            reverting = plane.start("snapshot", "revert", "vol", base, "--keep", kept, "--yes")
            (engine,) = wait_for(lambda: engines(plane), "its engine")
            line = words(engine)
            node = line[line.index("--control") + 1].split("/")[-3]
            lost = [pid for pid in plane.pids()
                    if f"{plane.cluster}/{node}/" in " ".join(words(pid)).strip() + "/"
                    and not words(pid)[0].endswith("storagectl")]
            assert {words(pid)[0].split("/")[-1] for pid in lost} == {
                "haptera-node", "haptera-engine", "haptera-replica"}
            for pid in lost:
                os.kill(pid, signals)
            begun = time.monotonic()
            other = "node-3" if node != "node-3" else "node-2"
            assert plane.run("volume", "attach", "vol", "--node", other)["node"] == other
            waits.append(time.monotonic() - begun)
            # It happened or not, and from here on neither changes.
            reverting.communicate(timeout=120)
            reverted.append(kept in [s["name"] for s in plane.run("snapshot", "list", "vol")])
            image = before if reverted[-1] else image
            assert plane.read() == image
            image = plane.image(SIZE).read_bytes()
            plane.write(plane.directory / "image")
            if signals == signal.SIGSTOP:
                for pid in lost:
                    os.kill(pid, signal.SIGCONT)
            plane.up()
            plane.until("all replicas", lambda v: v["robustness"] == "healthy")
            wait_for(lambda: len(engines(plane)) == 1, "the old engine to be gone", 30)
            assert plane.read() == image
            assert (kept in [s["name"] for s in plane.run("snapshot", "list", "vol")]
                    ) == reverted[-1], "it was reverted under a client"
            detach(plane)
        assert "MaintenanceAbandoned" in kinds(plane)
        plane.run("snapshot", "create", "vol", "end")
        assert attach(plane) == image
        return f"attached elsewhere after {max(waits):.1f} s at most; reverted: {reverted}"


@once
def test_hanging_engine_is_ended_for_an_attachment(context):
    """The engine of a maintenance hangs, its node does not: whoever wants to attach does not wait for
    it for ever."""
    with Plane(context) as plane:
        image = detached(plane)
        taking = plane.start("snapshot", "create", "vol", "s")
        wait_for(lambda: engines(plane), "its engine")
        for pid in engines(plane):
            os.kill(pid, signal.SIGSTOP)
        begun = time.monotonic()
        plane.run("volume", "attach", "vol", "--node", "node-1")
        waited = time.monotonic() - begun
        assert plane.read() == image.read_bytes()
        taking.communicate(timeout=120)
        plane.run("snapshot", "create", "vol", "s")
        return f"attached after {waited:.0f} s"


@once
def test_detached_without_replicas(context):
    """Nobody to ask: said at once, or in time; nothing is begun that stays. A record that is older
    than the replicas is taken over by nobody."""
    with Plane(context) as plane:
        plane.run("volume", "create", "vol", "--size", str(SIZE))
        store = plane.cluster / "controller"
        plane.kill(plane.daemon("controller"))
        shutil.copytree(store, plane.directory / "backup")
        plane.up()
        image = plane.image(SIZE)
        attach(plane)
        plane.write(image)
        detach(plane)
        # All of them hang.
        for pid in processes(plane, "haptera-replica"):
            os.kill(pid, signal.SIGSTOP)
        begun = time.monotonic()
        done = plane.start("snapshot", "create", "vol", "s", "--timeout", "12s")
        error = done.communicate(timeout=60)[1]
        assert done.returncode == 4 and "did not become ready in time" in error, error
        assert time.monotonic() - begun < 12
        wait_for(lambda: not engines(plane), "the engine to be gone", 30)
        for pid in processes(plane, "haptera-replica"):
            os.kill(pid, signal.SIGCONT)
        plane.run("snapshot", "create", "vol", "s")
        until_idle(plane)

        # None is there, nor its node.
        for pid in plane.pids():
            if not words(pid)[0].endswith("haptera-controller"):
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not any(n["ready"] for n in plane.run("node", "list")), "silence", 30)
        for command in (("snapshot", "create", "vol", "t"), ("volume", "resize", "vol", "1GiB"),
                        ("snapshot", "delete", "vol", "s", "--yes"),
                        ("snapshot", "revert", "vol", "s", "--yes")):
            done = plane.start(*command)
            error = done.communicate(timeout=60)[1]
            assert done.returncode == 4 and "no in-sync replica of it is running" in error, error
        assert plane.volume()["state"] == "detached"
        plane.up()
        plane.until("the replicas", lambda v: v["robustness"] == "healthy")
        plane.run("snapshot", "delete", "vol", "s", "--yes")
        assert attach(plane) == image.read_bytes()
        detach(plane)

        plane.kill(plane.daemon("controller"))
        shutil.rmtree(store)
        shutil.copytree(plane.directory / "backup", store)
        plane.up()
        done = plane.start("snapshot", "create", "vol", "old", "--timeout", "20s")
        error = done.communicate(timeout=60)[1]
        assert done.returncode == 4 and "serves nobody" in error, error
        wait_for(lambda: not engines(plane), "the engine to be gone", 30)
        plane.run("store", "reconstruct", "--volume", "vol", "--yes")
        plane.run("snapshot", "create", "vol", "new")
        assert attach(plane) == image.read_bytes()
        return "refused"


@once
def test_store_lost_meanwhile(context):
    """A store that is rebuilt from the nodes takes an engine without clients for what it is."""
    with Plane(context) as plane:
        image = detached(plane)
        agents = processes(plane, "haptera-node")
        taking = plane.start("snapshot", "create", "vol", "s")
        (engine,) = wait_for(lambda: engines(plane), "its engine")
        for pid in agents:  # Or it would be over too soon.
            os.kill(pid, signal.SIGSTOP)
        socket = words(engine)[words(engine).index("--control") + 1]

        def serves():
            try:
                return control(socket, "status")["state"] == "serving"
            except OSError:
                return False

        wait_for(serves, "it to serve")
        plane.kill(plane.daemon("controller"))
        taking.kill()
        taking.communicate()
        for pid in agents:
            os.kill(pid, signal.SIGCONT)
        for path in (plane.cluster / "controller").iterdir():
            path.unlink()
        plane.up()
        assert engines(plane) == [engine]
        plane.run("store", "reconstruct", "--from-nodes", "--yes")
        until_idle(plane)
        assert plane.volume()["state"] == "detached"
        plane.run("snapshot", "create", "vol", "s")
        assert attach(plane) == image.read_bytes()
        return "ended"
