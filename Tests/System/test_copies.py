"""Copies that are damaged, replaced, or out of space."""

import errno
import os
import random
import signal
import subprocess
import time

import nbd

from harness.cluster import BINARIES, MIB, wait_for
from harness.disks import SmallFileSystem
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
        return f"longest gap {load.longest_gap * 1e3:.0f} ms"


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
        longest = 0.0
        for first in range(0, history.blocks, 256):
            version = history.issue(first, 256, False)
            data = b"".join(history.expected(b, version) for b in range(first, first + 256))
            start = time.monotonic()
            handle.pwrite(data, first * BLOCK)
            longest = max(longest, time.monotonic() - start)
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
        return f"state {state}, longest write {longest * 1e3:.0f} ms"


def test_file_system_shut_down_and_mounted_again(context):
    """A file system gives up and is mounted again, and the host does not restart: what was
    acknowledged and not flushed is gone, and the copy must not pass for one that has it all."""
    with context.cluster(replicas=1, size=64 * MIB) as cluster:
        disk = SmallFileSystem(cluster.path, 192 * MIB)
        with disk as small:
            replica = cluster.replicas[0]
            replica.directory = small / "replica"
            # As a node agent has it: on the same disk.
            replica.control = small / "replica.sock"
            cluster.up()
            load = Workload(
                History(cluster.size // BLOCK), cluster.engine.unix, context.seed, flushes=0)
            load.start().wait_completed(500)
            disk.shut_down()
            status = replica.process.wait()
            cluster.engine.process.kill()
            load.join()
            disk.mount_again()
            replica.start()
            refuse_to_go_on(cluster)
            replica.shutdown()
            return f"{load.completed} requests, the replica's status {status}"


def test_a_bus_error_is_no_kill(context):
    """A file system that has shut itself down may refuse a store into the log's mapping before a
    sync fails. (Sent here: which file systems do it depends on the kernel.)"""
    with context.cluster(replicas=1, size=64 * MIB) as cluster:
        replica = cluster.replicas[0]
        cluster.up()
        load = Workload(
            History(cluster.size // BLOCK), cluster.engine.unix, context.seed, flushes=0)
        load.start().wait_completed(500)
        replica.process.signal(signal.SIGBUS)
        status = replica.process.wait()
        assert status == -signal.SIGBUS, f"it ended with {status}"
        cluster.engine.process.kill()
        load.join()
        replica.start()
        refuse_to_go_on(cluster)
        return f"{load.completed} requests"


def refuse_to_go_on(cluster):
    """For the same client, which remembers what was acknowledged."""
    engine = cluster.start_engine(wait=False)

    def is_refusing():
        assert not engine.is_serving(), "it serves what may have lost acknowledged writes"
        return engine.control.exists() and engine.status()["needsDecision"] == "true"

    wait_for(is_refusing, "the engine to refuse to go on from what may have been lost")
    engine.process.kill()


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
        return f"longest gap {load.longest_gap * 1e3:.0f} ms"


def connect(cluster):
    handle = nbd.NBD()
    handle.set_export_name("volume")
    handle.connect_unix(str(cluster.engine.unix))
    return handle


def test_last_copy_goes_on_when_its_damage_is_accepted(context):
    """The only replica's table page rots while it is stopped. It ends when the page is needed;
    with `accept-damage` the volume goes on, without the blocks that nothing is known of."""
    with context.cluster(replicas=1, size=64 * MIB) as cluster:
        replica = cluster.replicas[0]
        cluster.up()
        handle = connect(cluster)
        data = random.Random(context.seed).randbytes(8 * MIB)
        # Half of each region.
        for region in range(16):
            handle.pwrite(data[region * MIB // 2:(region + 1) * MIB // 2], region * MIB)
        handle.flush()
        handle.shutdown()
        cluster.engine.detach()
        replica.shutdown()
        region = 5
        (table,) = (replica.directory / "layers").glob("*.table")
        with open(table, "r+b") as file:
            file.seek(region * 8192)
            assert any(file.read(8192)), "the page was never written"
            file.seek(region * 8192)
            file.write(random.randbytes(8192))
            os.fsync(file.fileno())

        replica.start()
        cluster.start_engine()
        reader = connect(cluster)
        reader.aio_pread(nbd.Buffer(4096), region * MIB)
        assert replica.process.wait() == 1
        said = replica.process.log.read_text()
        assert f"the table page of region {region} is damaged" in said, said
        assert "haptera-replica accept-damage" in said, said
        cluster.engine.process.kill()
        # Alone, it starts as before: most of it can be read.
        replica.start()
        refused = subprocess.run(
            [BINARIES / "haptera-replica", "accept-damage", "--dir", replica.directory],
            capture_output=True, text=True)
        assert refused.returncode == 1 and "is in use" in refused.stderr, refused
        replica.process.kill()

        shown = replica.tool("accept-damage").decode()
        assert f"damaged bytes: {region * MIB}..<{region * MIB + MIB // 2}\n" in shown, shown
        replica.tool("accept-damage", "--accept")
        replica.start()
        cluster.start_engine(client_generation=2)
        handle = connect(cluster)
        for other in range(16):
            part = data[other * MIB // 2:(other + 1) * MIB // 2]
            assert handle.pread(MIB // 2, other * MIB + MIB // 2) == bytes(MIB // 2)
            if other != region:
                assert handle.pread(MIB // 2, other * MIB) == part, f"region {other}"
        for block in range(0, MIB // 2, 4096):
            try:
                handle.pread(4096, region * MIB + block)
                raise AssertionError(f"block {block} was read")
            except nbd.Error as error:
                assert error.errnum == errno.EIO, error
        handle.pwrite(data[:MIB // 2], region * MIB)
        assert handle.pread(MIB // 2, region * MIB) == data[:MIB // 2]
        handle.flush()
        handle.shutdown()
        cluster.engine.detach()
        replica.shutdown()
        replica.verify()
        return shown.splitlines()[-2]
