"""What is put on nodes, and what is not."""

import time

from harness.cluster import MIB, wait_for
from harness.plane import Plane

GIB = 1024 * MIB


def test_limits_of_nodes(context):
    """Sparse volumes beyond the disk are fine until somebody limits them; then creations (of many
    at once only those that fit), clones, replacements and growth stop at the limit, whether the
    node is named or not. A shortage of space is told once, and over when there is more."""
    with Plane(context) as plane:
        def node(name="node-1"):
            return plane.run("node", "show", name)

        def kinds(kind):
            return [e for e in plane.run("events", "--limit", "1000") if e["kind"] == kind]

        capacity = node()["capacityBytes"]
        assert node()["overcommitPercent"] is None and node()["conditions"] == [], node()
        tib = 1 << 40
        plane.run("volume", "create", "vol", "--size", str(tib))
        assert node()["promisedBytes"] == tib, node()
        plane.run("volume", "delete", "vol")

        # Ten times a tenth of the capacity, and a little.
        size = capacity // 10 // MIB * MIB
        for number in (1, 2, 3):
            plane.run("node", "update", f"node-{number}", "--overcommit", "100")
        making = [plane.start("volume", "create", f"v{number}", "--size", str(size),
                              "--replicas", "2") for number in range(20)]
        errors = [process.communicate(timeout=120)[1] for process in making]
        made = [n for n, process in enumerate(making) if process.returncode == 0]
        refused = [error for error in errors if error.strip()]
        assert len(made) == 15, (made, refused)
        assert all("has no room for a replica of volume 'v" in error for error in refused), refused
        for number in (1, 2, 3):
            shown = node(f"node-{number}")
            assert shown["promisedBytes"] == 10 * size <= capacity, shown
            assert shown["allocatedBytes"] > 0, shown
        error = plane.run("volume", "create", "more", "--size", str(GIB), "--replicas", "1",
                          "--node", "node-2", fails=True)
        assert "node node-2 has no room" in error, error
        assert "storagectl node update node-2 --overcommit" in error, error

        # Growth, attached and detached: all nodes or none.
        name = f"v{made[0]}"
        nodes = [replica["node"] for replica in plane.run("volume", "show", name)["replicas"]]
        plane.run("node", "update", nodes[0], "--overcommit", "150%")
        for verb in ("detach", "attach"):
            plane.run("volume", verb, name)
            error = plane.run("volume", "resize", name, str(2 * size), fails=True)
            assert f"node {nodes[1]} has no room for volume '{name}' to grow" in error, error
            assert plane.run("volume", "show", name)["sizeBytes"] == size
        assert node(nodes[0])["promisedBytes"] == 10 * size
        plane.run("node", "update", nodes[1], "--overcommit", "150%")
        assert plane.run("volume", "resize", name, str(2 * size))["sizeBytes"] == 2 * size
        assert [node(n)["promisedBytes"] for n in nodes] == [11 * size] * 2
        # A clone and a replacement: where there is no room for them.
        plane.run("snapshot", "create", name, "s")
        error = plane.run("volume", "create", "copy", "--from", f"{name}@s", "--size",
                          str(5 * size), fails=True)
        assert "has no room for a replica of volume 'copy'" in error, error
        replica = plane.run("volume", "show", name)["replicas"][0]["id"]
        error = plane.run("replica", "replace", name, replica, fails=True)
        assert "no other ready node has room" in error, error

        # Below the reserve: the other node is chosen.
        for number in (1, 2, 3):
            plane.run("node", "update", f"node-{number}", "--overcommit", "none")
        shown = plane.run("node", "update", "node-3", "--reserve", str(capacity))
        assert shown["conditions"] == ["lowSpace"], shown
        assert [n["name"] for n in plane.run("node", "list") if n["conditions"]] == ["node-3"]
        time.sleep(3)
        assert len(kinds("NodeSpaceLow")) == 1
        small = plane.run("volume", "create", "small", "--size", str(GIB), "--replicas", "2")
        assert {r["node"] for r in small["replicas"]} == {"node-1", "node-2"}, small
        error = plane.run("volume", "create", "three", "--size", str(GIB), fails=True)
        assert "3 replicas need 3 nodes, and 2 can be used; node node-3 has no room" in error, error
        # A controller that is started again knows all of it.
        plane.kill(plane.daemon("controller"))
        plane.up()
        wait_for(lambda: node("node-3")["ready"], "the node")
        assert node("node-3")["conditions"] == ["lowSpace"]
        assert len(kinds("NodeSpaceLow")) == 1
        plane.run("node", "update", "node-3", "--reserve", "0")
        wait_for(lambda: not node("node-3")["conditions"], "the end of the shortage")
        assert len(kinds("NodeSpaceRecovered")) == 1
        plane.run("volume", "create", "three", "--size", str(GIB))
        return f"{len(made)} of {len(making)} volumes"
