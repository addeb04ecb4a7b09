"""Copies that are damaged, replaced, or out of space."""

import pathlib
import shutil
import subprocess

import nbd

from harness.cluster import MIB, wait_for
from harness.context import SkipTest
from harness.workload import BLOCK, History, Workload, check_all

LOADED = 64 * MIB // BLOCK


def test_replica_replaced_by_an_empty_one(context):
    """A new incarnation under the old id holds nothing and is filled from the start."""
    with context.cluster() as cluster:
        cluster.up()
        history = History(LOADED)
        load = Workload(history, cluster.engine.unix, context.seed).start()
        load.wait_completed(2000)
        replaced = cluster.replicas[0]
        replaced.process.kill()
        replaced.recreate()
        replaced.start()
        wait_for(
            lambda: (replaced.id, replaced.incarnation) in cluster.record().in_sync,
            "the new incarnation to be in sync", 120)
        error = load.stop()
        assert error is None, f"the client got an error: {error}"
        check_all(history, cluster.engine.unix)
        cluster.check_copies()


def test_damaged_block_is_read_elsewhere_and_repaired(context):
    """Flipped bytes in one copy are never returned, and the copy is rewritten."""
    with context.cluster() as cluster:
        cluster.up()
        history = History(1024)
        load = Workload(history, cluster.engine.unix, context.seed, writes_only=True).start()
        load.wait_completed(400)
        assert load.stop() is None
        cluster.engine.detach()
        for replica in cluster.replicas:
            replica.shutdown()
        damaged = cluster.replicas[0]
        (layer,) = (damaged.directory / "layers").glob("*.data")
        blocks = [b for b in range(history.blocks) if history.acknowledged[b]][::7]
        with open(layer, "r+b") as file:
            for block in blocks:
                file.seek(block * BLOCK + 100)
                byte = file.read(1)
                file.seek(block * BLOCK + 100)
                file.write(bytes([byte[0] ^ 0x40]))
        try:
            damaged.tool("verify", "--json")
            raise RuntimeError("verify saw no damage")
        except AssertionError:
            pass  # exit status 1 is what it is for
        cluster.start_replicas()
        cluster.start_engine()

        def is_repaired():
            # Whoever answers faster is read more: a member that was slow once may be left alone
            # for seconds, so a fixed number of passes is no promise that each copy was read.
            check_all(history, cluster.engine.unix)
            return int(
                cluster.engine.metrics()["haptera_engine_repaired_blocks_total"]) >= len(blocks)

        wait_for(is_repaired, "every damaged block to be read and repaired")
        cluster.check_copies()
        return f"{len(blocks)} blocks damaged and repaired"


def test_full_replica_leaves_and_nothing_else(context):
    """One replica's file system fills up: it is full, the volume goes on with the others."""
    with context.cluster() as cluster, SmallFileSystem(cluster.path, 96 * MIB) as small:
        full = cluster.replicas[2]
        full.directory = small / "replica"
        cluster.up()
        history = History(cluster.size // BLOCK)
        handle = nbd.NBD()
        handle.set_export_name("volume")
        handle.connect_unix(str(cluster.engine.unix))
        for first in range(0, history.blocks, 256):
            version = history.issue(first, 256, False)
            data = b"".join(history.expected(b, version) for b in range(first, first + 256))
            handle.pwrite(data, first * BLOCK)
            history.acknowledge(first, 256, version)
        handle.flush()
        handle.shutdown()
        wait_for(lambda: len(cluster.record().in_sync) == 2, "the full replica's removal")
        state = cluster.engine.state(full)
        assert state in ("full", "joining", "absent"), state
        check_all(history, cluster.engine.unix)
        cluster.replicas = cluster.replicas[:2]
        cluster.check_copies()
        full.process.kill()
        return f"state {state}"


def test_failing_disk_costs_a_replica_not_an_error(context):
    """Writes that end with EIO make one replica failed; the client notices nothing."""
    with context.cluster() as cluster:
        failing = cluster.replicas[1]
        failing.environment = {"HAPTERA_FAULTS": "write:data:EIO:every=200"}
        cluster.up()
        history = History(LOADED)
        load = Workload(history, cluster.engine.unix, context.seed, writes_only=True).start()
        wait_for(lambda: len(cluster.record().in_sync) == 2, "the failing replica's removal")
        load.wait_completed(500)
        error = load.stop()
        assert error is None, f"the client got an error: {error}"
        check_all(history, cluster.engine.unix)
        failing.process.kill()
        cluster.replicas.remove(failing)
        cluster.check_copies()


class SmallFileSystem:
    """A loop-mounted ext4 of its own, which can be filled without harm."""

    def __init__(self, directory, size):
        self.image, self.mount = directory / "small.img", directory / "small"
        self.size = size

    def __enter__(self):
        self.mount.mkdir()
        with open(self.image, "wb") as file:
            file.truncate(self.size)
        subprocess.run(["mkfs.ext4", "-q", "-b", "4096", self.image], check=True)
        done = subprocess.run(
            ["mount", "-o", "loop", self.image, self.mount], capture_output=True, text=True)
        if done.returncode != 0:
            raise SkipTest(f"cannot mount a loop device: {done.stderr.strip()}")
        return pathlib.Path(self.mount)

    def __exit__(self, *_):
        subprocess.run(["umount", "-l", self.mount], check=False)
        shutil.rmtree(self.mount, ignore_errors=True)
