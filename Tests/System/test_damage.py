"""What an administrator learns of damaged blocks."""

import nbd

from harness.cluster import MIB, wait_for
from harness.plane import Plane
from harness.workload import BLOCK

SIZE = 16 * MIB


def flip(replica, blocks):
    """One bit of each of the blocks, while the replica runs."""
    (data,) = (replica["directory"] / "layers").glob("*.data")
    with open(data, "r+b", buffering=0) as file:
        for block in blocks:
            file.seek(block * BLOCK + 100)
            byte = file.read(1)
            file.seek(block * BLOCK + 100)
            file.write(bytes([byte[0] ^ 0x40]))


def events(plane, kind):
    return [e for e in plane.run("events", "--limit", "1000") if e["kind"] == kind]


def reads(plane, offset):
    client = nbd.NBD()
    client.connect_uri(plane.volume()["engine"]["uri"])
    try:
        return client.pread(BLOCK, offset)
    except nbd.Error:
        return None
    finally:
        client.shutdown()


def test_damage_is_told(context):
    """Bits flip in one copy: an event says that it was repaired, and where. Then in all copies of a
    block: another event and a condition, until it is written anew and the volume scrubbed. The
    controller is started again in between, and tells nothing twice."""
    with Plane(context) as plane:
        plane.run("schedule", "delete", "weekly-scrub")
        plane.run("volume", "create", "vol", "--size", str(SIZE))
        plane.run("volume", "attach", "vol")
        image = plane.image(SIZE)
        plane.write(image)
        replicas = list(plane.replicas().values())
        for replica in replicas:
            replica["directory"] = plane.cluster / replica["directory"]
        flip(replicas[0], range(1, SIZE // BLOCK, 32))

        def is_told():
            # Whoever answers faster is read more: it may take some passes.
            assert plane.read() == image.read_bytes()
            return events(plane, "BlocksRepaired")

        (event,) = wait_for(is_told, "the repair to be told", 60)
        assert event["subject"] == "volume/vol" and "rewritten" in event["message"], event
        assert f"replica {replicas[0]['id']} on node {replicas[0]['node']}" in event["message"]
        assert plane.volume()["conditions"] == []

        for replica in replicas:
            flip(replica, [2])
        # However often it is read, it is one block.
        for _ in range(3):
            assert reads(plane, 2 * BLOCK) is None
        (event,) = wait_for(lambda: events(plane, "BlocksLost"), "the loss to be told", 30)
        assert f"offset {2 * BLOCK} " in event["message"], event
        assert event["message"].startswith("1 block "), event
        for replica in replicas:
            assert f"replica {replica['id']} on node {replica['node']}" in event["message"], event
        assert plane.volume()["conditions"] == ["lostBlocks"]

        plane.kill(plane.daemon("controller"))
        plane.up()
        plane.until("the controller to know", lambda v: v["robustness"] == "healthy")
        assert plane.volume()["conditions"] == ["lostBlocks"]
        plane.write(plane.image(BLOCK), 2 * BLOCK)
        assert reads(plane, 2 * BLOCK) is not None
        plane.run("volume", "scrub", "vol", "--wait")
        assert plane.volume()["conditions"] == []
        assert len(events(plane, "BlocksLost")) == 1
        return event["message"]
