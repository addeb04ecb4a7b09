"""A volume grows while it is served: its clients, snapshots and replicas, whatever dies meanwhile."""

import random
import subprocess

import nbd

from harness.cluster import BINARIES, MIB, ControlError, control
from harness.context import once
from harness.plane import Plane
from harness.workload import BLOCK, History, Workload, check_all

# Neither a whole number of regions.
SMALL, LARGE = 32 * MIB + 96 * BLOCK, 128 * MIB + 8 * BLOCK


def connect(cluster, snapshot=None):
    handle = nbd.NBD()
    handle.set_export_name(f"volume@{snapshot}" if snapshot else "volume")
    handle.connect_unix(str(cluster.engine.unix))
    return handle


def resize(cluster, size):
    return control(cluster.engine.control, "resize", size=size)


def refusal(cluster, **arguments):
    try:
        control(cluster.engine.control, "resize", **arguments)
    except ControlError as error:
        return str(error)
    raise AssertionError(f"resize with {arguments} was not refused")


def test_a_volume_grows_under_load_and_faults(context):
    """Twice, with a replica away and the engine killed: nothing written before or after is lost."""
    with context.cluster(size=SMALL) as cluster:
        cluster.up()
        chance = random.Random(context.seed)
        load = Workload(History(SMALL // BLOCK), cluster.engine.unix, context.seed).start()
        load.wait_completed(500)
        control(cluster.engine.control, "snapshot", name="small", created=1)
        old = connect(cluster)
        assert old.get_size() == SMALL
        load.reset_gap()
        assert "existed" not in resize(cluster, LARGE // 2 // BLOCK * BLOCK)
        load.wait_completed(300)
        gap = load.longest_gap

        # One that connected before may use what is new (an attached kernel does); new ones see it.
        model = bytearray(LARGE)
        def scatter(handle, first, last):
            for _ in range(100):
                offset = chance.randrange(first // 512, last // 512 - 64) * 512
                data = chance.randbytes(chance.randrange(1, 65) * 512)
                handle.pwrite(data, offset)
                model[offset:offset + len(data)] = data

        old.set_strict_mode(0)
        scatter(old, SMALL, LARGE // 2)
        away = cluster.replicas[2]
        away.process.kill()
        cluster.engine.wait_state(away, "absent")
        assert resize(cluster, LARGE)["size"] == str(LARGE)
        cluster.size = LARGE
        live = connect(cluster)
        assert live.get_size() == LARGE
        scatter(live, SMALL, LARGE)
        away.start()
        cluster.engine.wait_state(away, "inSync")
        error = load.stop()
        assert error is None, f"the client got an error: {error}"
        live.flush()
        live.shutdown()
        old.shutdown()
        cluster.engine.process.kill()
        cluster.start_engine(client_generation=2)
        check_all(load.history, cluster.engine.unix)
        live = connect(cluster)
        assert live.get_size() == LARGE
        for offset in range(SMALL, LARGE, MIB):
            length = min(MIB, LARGE - offset)
            assert live.pread(length, offset) == model[offset:offset + length], f"at {offset}"
        live.shutdown()
        snapshot = connect(cluster, "small")
        assert snapshot.get_size() == SMALL, "a snapshot has another size than it was taken at"
        snapshot.shutdown()

        assert resize(cluster, LARGE)["existed"] == "1"
        assert "never shrinks" in refusal(cluster, size=SMALL)
        for size in (0, 4095, LARGE + 1, 2**51, "x", ""):
            assert "resize needs size=BYTES" in refusal(cluster, size=size)
        assert "resize needs size=BYTES" in refusal(cluster)
        cluster.check_copies()
        for replica in cluster.replicas:
            image = subprocess.run(
                [BINARIES / "haptera-replica", "export", "--dir", replica.directory, "--output",
                 "-"], check=True, stdout=subprocess.PIPE).stdout
            assert len(image) == LARGE
            assert image[SMALL:] == model[SMALL:], f"replica {replica.number}"
        return f"{SMALL // MIB} to {LARGE // MIB} MiB, {load.completed} requests, longest gap {gap * 1e3:.0f} ms"


def test_a_replica_that_cannot_grow_keeps_the_size(context):
    """A file system's limit on one node: refused, with the replica's name, and nobody is lost."""
    with context.cluster(size=SMALL) as cluster:
        cluster.up()
        limited = cluster.replicas[1]
        subprocess.run(
            ["prlimit", "--pid", str(limited.process.pid), f"--fsize={LARGE}"], check=True)
        live = connect(cluster)
        live.pwrite(b"x" * BLOCK, 0)
        message = refusal(cluster, size=1 << 40)
        assert limited.text in message and "keeps its size" in message, message
        assert live.pread(BLOCK, 0) == b"x" * BLOCK
        live.pwrite(b"y" * BLOCK, SMALL - BLOCK)
        for replica in cluster.replicas:
            assert cluster.engine.state(replica) == "inSync"
        assert resize(cluster, SMALL + MIB)["size"] == str(SMALL + MIB)
        cluster.size = SMALL + MIB
        live.shutdown()
        live = connect(cluster)
        assert live.get_size() == SMALL + MIB
        assert live.pread(BLOCK, SMALL - BLOCK) == b"y" * BLOCK
        live.shutdown()
        cluster.check_copies()
        return "refused"


@once
def test_resize_and_scrub_commands(context):
    """Over the whole control plane: the size outlives replicas and attachments, all of it is scrubbed."""
    with Plane(context) as plane:
        plane.run("volume", "create", "vol", "--size", str(32 * MIB))
        assert plane.run("volume", "scrub-status", "vol")["state"] is None
        plane.run("volume", "attach", "vol")
        image = plane.image(32 * MIB)
        content = image.read_bytes()
        plane.write(image)
        plane.run("snapshot", "create", "vol", "small")
        assert plane.run("volume", "resize", "vol", "64MiB")["sizeBytes"] == 64 * MIB
        assert "never shrinks" in plane.run("volume", "resize", "vol", "32MiB", fails=True)
        assert plane.run("snapshot", "show", "vol", "small")["sizeBytes"] == 32 * MIB
        tail = plane.image(MIB)
        plane.write(tail, 63 * MIB)
        content += bytes(31 * MIB) + tail.read_bytes()

        # A replica that is started anew is made sure of with the size of now.
        victim = plane.replicas()["node-2"]
        plane.kill(victim["pid"])
        plane.until("all replicas to be in sync again", lambda volume: all(
            replica["inSync"] and replica["pid"] not in (None, victim["pid"])
            for replica in volume["replicas"]) and volume["robustness"] == "healthy")

        scrubbed = plane.run("volume", "scrub", "vol", "--wait")
        assert scrubbed["state"] == "finished" and scrubbed["blocksBad"] == 0, scrubbed
        assert scrubbed["regionsDone"] == scrubbed["regionsTotal"] == 64, scrubbed
        assert scrubbed["blocksChecked"] == 3 * 33 * 256, scrubbed
        assert plane.run("volume", "scrub-status", "vol") == scrubbed
        plane.run("volume", "detach", "vol")
        plane.run("volume", "attach", "vol")
        assert plane.volume()["sizeBytes"] == 64 * MIB
        assert plane.read() == content
        kinds = {event["kind"] for event in plane.run("events", "--limit", "500")}
        wanted = {"ResizeRequested", "VolumeResized", "ScrubRequested", "ScrubFinished"}
        assert wanted <= kinds, wanted - kinds
        return f"{scrubbed['blocksChecked']} blocks scrubbed"
