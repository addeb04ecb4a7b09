"""Volumes that begin as a snapshot of another one, and share its layers' files."""

import os
import pathlib
import random
import signal
import statistics
import subprocess
import threading
import time

import nbd

from harness.cluster import BINARIES, MIB, control, wait_for
from harness.plane import Plane
from harness.workload import BLOCK

SIZE = 64 * MIB


class Volumes:
    """Volumes of a plane, by name."""

    def __init__(self, plane):
        self.plane = plane

    def show(self, name):
        return self.plane.run("volume", "show", name)

    def connect(self, name, snapshot=None):
        uri = self.show(name)["engine"]["uri"]
        handle = nbd.NBD()
        handle.connect_uri(uri if snapshot is None else f"{uri}@{snapshot}")
        return handle

    def write(self, name, data, offset=0):
        handle = self.connect(name)
        for at in range(0, len(data), MIB):
            handle.pwrite(data[at:at + MIB], offset + at)
        handle.flush()
        handle.shutdown()

    def read(self, name, snapshot=None):
        handle = self.connect(name, snapshot)
        size = handle.get_size()
        data = b"".join(handle.pread(min(MIB, size - at), at) for at in range(0, size, MIB))
        handle.shutdown()
        return data

    def directories(self, name):
        return [pathlib.Path(replica["directory"]) for replica in self.show(name)["replicas"]]

    def files(self, name):
        """By inode, what each data file of the volume's replicas takes."""
        found = {}
        for directory in self.directories(name):
            for path in (directory / "layers").glob("*.data"):
                status = path.stat()
                found[status.st_ino] = status.st_blocks * 512
        return found

    def statuses(self, name):
        return [control(next(self.plane.cluster.glob(f"**/run/r-{replica['id']}.sock")), "status")
                for replica in self.show(name)["replicas"]]

    def create(self, name, *words):
        begun = time.monotonic()
        self.plane.run("volume", "create", name, *words)
        return time.monotonic() - begun


def verify(directories):
    """By the offline tool, while nobody serves them."""
    for directory in directories:
        subprocess.run([BINARIES / "haptera-replica", "verify", "--dir", directory], check=True,
                       capture_output=True)


def test_a_clone_is_quick_small_and_independent(context):
    """It holds the snapshot, takes no space, and neither volume sees what becomes of the other:
    writes, snapshots, deletions of the shared snapshot, of the source, of the clone."""
    with Plane(context) as plane:
        volumes, chance = Volumes(plane), random.Random(context.seed)
        first, second = chance.randbytes(24 * MIB), chance.randbytes(8 * MIB)
        volumes.create("vol", "--size", str(SIZE))
        plane.run("volume", "attach", "vol")
        volumes.write("vol", first)
        plane.run("snapshot", "create", "vol", "lower")
        volumes.write("vol", second, 20 * MIB)
        plane.run("snapshot", "create", "vol", "golden")
        golden = volumes.read("vol")
        assert golden == volumes.read("vol", "golden")

        # A client writes on all the while.
        written = chance.randbytes(2 * MIB)
        # Whatever its size, and little more than an empty volume takes in the same seconds; on a
        # busy machine one may take longer.
        taken, empty = [], []
        for name in ("first", "second"):
            taken.append(volumes.create(name, "--from", "vol@golden"))
            plane.run("volume", "delete", name)
            empty.append(volumes.create(name, "--size", str(SIZE)))
            plane.run("volume", "delete", name)
        taken.append(volumes.create("copy", "--from", "vol@golden"))
        usual = max(1.5, 3 * statistics.median(empty))
        assert statistics.median(taken) < usual and max(taken) < 2 * usual, (taken, empty)
        volumes.write("vol", written, 3 * MIB)
        shown = volumes.show("copy")
        assert (shown["originVolume"], shown["originSnapshot"]) == ("vol", "golden"), shown
        shared = volumes.files("vol").keys() & volumes.files("copy").keys()
        assert len(shared) == 6, "two layers of three replicas"
        own = sum(size for inode, size in volumes.files("copy").items() if inode not in shared)
        assert own < MIB, own
        plane.run("volume", "attach", "copy")
        assert volumes.read("copy") == golden
        assert volumes.read("copy", "golden") == golden
        mine = chance.randbytes(4 * MIB)
        volumes.write("copy", mine, 30 * MIB)
        changed = golden[:30 * MIB] + mine + golden[34 * MIB:]
        assert volumes.read("copy") == changed
        assert volumes.read("vol", "golden") == golden

        # The snapshot goes at the source: what it holds stays, for as long as the clone has it.
        head = golden[:3 * MIB] + written + golden[5 * MIB:]
        plane.run("snapshot", "delete", "vol", "golden", "--yes")
        plane.run("snapshot", "delete", "vol", "lower", "--yes")
        time.sleep(2)
        assert volumes.read("vol") == head and volumes.read("copy") == changed
        assert all(status["retiredLayers"] == "2" for status in volumes.statuses("vol"))
        # A snapshot of the clone, and a clone of that.
        plane.run("snapshot", "create", "copy", "again")
        volumes.create("grandchild", "--from", "copy@again", "--size", str(SIZE + 16 * MIB))
        plane.run("volume", "attach", "grandchild")
        assert volumes.read("grandchild") == changed + bytes(16 * MIB)
        volumes.write("grandchild", b"end" * 4096, SIZE + MIB)

        # The source goes.
        plane.run("volume", "detach", "vol")
        plane.run("volume", "delete", "vol")
        assert volumes.read("copy") == changed and volumes.read("grandchild")[:SIZE] == changed
        # And the clone in the middle: what is left is its clone's alone, and becomes one.
        plane.run("volume", "detach", "copy")
        directories = volumes.directories("copy")
        plane.run("volume", "delete", "copy")
        assert not any(directory.exists() for directory in directories)
        wait_for(lambda: all(status["retiredLayers"] == "0" and status["sharedLayers"] == "0"
                             for status in volumes.statuses("grandchild")), "the merges", 60)
        assert volumes.read("grandchild")[:SIZE] == changed
        directories = volumes.directories("grandchild")
        plane.run("volume", "detach", "grandchild")
        plane.kill_all()
        verify(directories)
        return (f"made in {statistics.median(taken):.2f} s (median of 3), {own // 1024} KiB of "
                "its own")


def test_clones_of_a_slow_source(context):
    """The source's replica is stopped for a while, for longer than it is waited for at a time, or
    dies: the command says what it waits for, and ends with the volume. It gives up when its time is
    up, and goes on when asked again."""
    with Plane(context) as plane:
        volumes, chance = Volumes(plane), random.Random(context.seed)
        data = chance.randbytes(4 * MIB)
        volumes.create("vol", "--size", str(SIZE), "--replicas", "1")
        plane.run("volume", "attach", "vol")
        volumes.write("vol", data)
        plane.run("snapshot", "create", "vol", "golden")

        def source():
            return volumes.show("vol")["replicas"][0]

        def reason(name):
            shown = volumes.show(name)
            assert (shown["state"], shown["robustness"]) == ("creating", "healthy"), shown
            return shown["reason"] or ""

        waits = f"waits for replica {source()['id']} to share its layers"
        taken = []
        for number, pause in enumerate((6, 13, 4)):
            pid, name = source()["pid"], f"c{number}"
            os.kill(pid, signal.SIGSTOP)
            begun = time.monotonic()
            command = plane.start("volume", "create", name, "--from", "vol@golden")
            try:
                wait_for(lambda: any(v["name"] == name  # pylint: disable=W0640
                                     for v in plane.run("volume", "list")), "a start")
                wait_for(lambda: waits in reason(name), "the reason", 15)  # pylint: disable=W0640
                if number == 1:
                    # Long enough to be told why, whatever else this machine does.
                    text = plane.run("volume", "create", name, "--from", "vol@golden", "--timeout",
                                     "5", fails=True)
                    assert "not done after 5 s" in text and waits in text, text
                time.sleep(max(0, begun + pause - time.monotonic()))
            finally:
                # The last one is started again by its agent.
                os.kill(pid, signal.SIGKILL if number == 2 else signal.SIGCONT)
            output, errors = command.communicate(timeout=60)
            assert command.returncode == 0, (output, errors)
            taken.append(time.monotonic() - begun)
            assert taken[-1] > pause - 1, taken
        for name in ("c0", "c1", "c2"):
            plane.run("volume", "attach", name)
            assert volumes.read(name)[:len(data)] == data, name
            plane.run("volume", "detach", name)
        return "made in " + ", ".join(f"{seconds:.1f}" for seconds in taken) + " s"


def test_removed_replicas_do_not_stay(context):
    """The power fails while a clone's replicas are deleted, and nobody remembers them: their
    agents delete what is left when they start, and the source's layers are its own again."""
    with Plane(context) as plane:
        volumes, chance = Volumes(plane), random.Random(context.seed)
        data = chance.randbytes(4 * MIB)
        volumes.create("vol", "--size", str(SIZE))
        plane.run("volume", "attach", "vol")
        volumes.write("vol", data)
        plane.run("snapshot", "create", "vol", "golden")
        volumes.create("copy", "--from", "vol@golden")
        plane.run("volume", "attach", "copy")
        assert all(status["sharedLayers"] == "1" for status in volumes.statuses("vol"))
        # What was deleted comes back with the power: links are what a copy of it would be.
        left = []
        for directory in volumes.directories("copy"):
            saved = directory.with_name("saved")
            subprocess.run(["cp", "--archive", "--link", directory, saved], check=True)
            left.append((saved, directory.with_name(directory.name + ".removed")))
        plane.run("volume", "detach", "copy")
        plane.run("volume", "delete", "copy")
        assert not any(removed.exists() for _, removed in left)
        for saved, removed in left:
            saved.rename(removed)
        for _, removed in left:
            assert any(file.stat().st_nlink > 1 for file in (removed / "layers").iterdir())
        assert all(status["sharedLayers"] == "1" for status in volumes.statuses("vol"))
        bystander = left[0][1].with_name("notes.removed")
        bystander.mkdir()
        for node in ("node-1", "node-2", "node-3"):
            plane.kill(plane.daemon(node))
        plane.up()
        wait_for(lambda: not any(removed.exists() for _, removed in left), "the sweep", 30)
        wait_for(lambda: all(status["sharedLayers"] == "0" for status in volumes.statuses("vol")),
                 "the layers to be the source's alone", 30)
        assert bystander.exists()
        said = [line for log in plane.cluster.glob("*.log") for line in
                log.read_text(errors="replace").splitlines()
                if "deleted what was left of a removed replica" in line]
        assert len(said) == 3, said
        assert volumes.read("vol")[:len(data)] == data
        return "3 directories"


def test_a_clone_of_a_large_volume(context):
    """100 GiB, a block in each of 2,000 regions all over it; the cluster's directory has a space in
    its name."""
    with Plane(context, folder="two words") as plane:
        volumes, chance = Volumes(plane), random.Random(context.seed)
        size = 100 << 30
        volumes.create("vol", "--size", str(size))
        plane.run("volume", "attach", "vol")
        handle, written = volumes.connect("vol"), {}
        for region in chance.sample(range(size // MIB), 2000):
            written[region * MIB] = chance.randbytes(BLOCK)
            handle.pwrite(written[region * MIB], region * MIB)
        handle.flush()
        plane.run("snapshot", "create", "vol", "golden")
        handle.pwrite(b"later" * 1024, min(written))
        handle.shutdown()
        taken = volumes.create("copy", "--from", "vol@golden")
        plane.run("volume", "attach", "copy")
        handle = volumes.connect("copy")
        for offset, data in written.items():
            assert handle.pread(BLOCK, offset) == data, offset
        handle.shutdown()
        return f"100 GiB, 2,000 regions written, in {taken:.2f} s"


def test_clones_of_a_busy_volume(context):
    """Clones of one snapshot after the other while a client writes, replicas die and come back:
    each is what its snapshot is."""
    with Plane(context) as plane:
        volumes, chance = Volumes(plane), random.Random(context.seed)
        volumes.create("vol", "--size", str(SIZE))
        plane.run("volume", "attach", "vol")
        volumes.write("vol", chance.randbytes(8 * MIB))
        done, failures = threading.Event(), []

        def scribble():
            try:
                handle = volumes.connect("vol")
                while not done.is_set():
                    handle.pwrite(chance.randbytes(BLOCK), chance.randrange(SIZE // BLOCK) * BLOCK)
                handle.shutdown()
            except Exception as error:  # pylint: disable=broad-except
                failures.append(error)

        writer = threading.Thread(target=scribble)
        writer.start()
        slowest = 0
        try:
            for number in range(4):
                name = f"s{number}"
                plane.run("snapshot", "create", "vol", name)
                if number == 2:
                    # Two members are left, and two copies of the clone are links; the third is
                    # filled when an engine has it.
                    victim = next(r for r in volumes.show("vol")["replicas"])
                    os.kill(victim["pid"], signal.SIGSTOP)
                    wait_for(lambda: volumes.show("vol")["robustness"] == "degraded", "removal", 30)
                slowest = max(slowest, volumes.create(f"c{number}", "--from", f"vol@{name}"))
                if number == 2:
                    os.kill(victim["pid"], signal.SIGCONT)
                if number == 1:
                    plane.run("snapshot", "delete", "vol", "s0", "--yes")
        finally:
            done.set()
            writer.join()
        assert not failures, failures
        for number in range(4):
            name = f"c{number}"
            plane.run("volume", "attach", name)
            content = volumes.read(name)
            if number > 0:
                assert content == volumes.read("vol", f"s{number}"), name
            assert content == volumes.read(name, f"s{number}"), name
            wait_for(lambda: volumes.show(name)["robustness"] == "healthy", "health", 60)
            plane.run("volume", "detach", name)
        return f"4 clones, slowest {slowest:.2f} s"
