"""Going back to a snapshot: what the volume holds then, what is kept, whatever dies meanwhile."""

import hashlib
import random
import threading
import time

from harness.cluster import MIB, ControlError, control, wait_for
from harness.plane import Plane
from harness.workload import BLOCK
from test_snapshots import SIZE, connect, digest, offline_digest, scribble, take


def revert(cluster, snapshot, keep):
    return control(
        cluster.engine.control, "revert", snapshot=snapshot, keep=keep,
        created=int(time.time() * 1000))


def delete(cluster, name):
    control(cluster.engine.control, "delete-snapshot", name=name)


def refusal(cluster, snapshot, keep):
    try:
        revert(cluster, snapshot, keep)
        raise RuntimeError("it was reverted")
    except ControlError as error:
        return str(error)


def change(cluster, model, chance, count=60):
    """Scribbles, flushes, and leaves."""
    live = connect(cluster)
    scribble(live, model, chance, count)
    live.flush()
    live.shutdown()
    wait_for(lambda: cluster.engine.status()["connections"] == "0", "the client to be gone")


def test_reverts_against_a_model(context):
    """Back and forth between snapshots, some deleted, a replica away for some of it, the engine
    killed in the middle of others: the volume and every snapshot left are what the model says."""
    with context.cluster(size=SIZE) as cluster:
        cluster.up()
        chance = random.Random(context.seed)
        model, kept, reverts, pauses = bytearray(SIZE), {}, 0, []
        away = cluster.replicas[2]

        def back(name, dies=False):
            nonlocal model, reverts
            reverts += 1
            keep = f"kept-{reverts}"
            before = bytes(model)
            if dies:
                # It may or may not have happened when the engine dies: the next one is asked again.
                engine = cluster.engine.process
                threading.Timer(chance.random() * 0.02, engine.kill).start()
                try:
                    revert(cluster, name, keep)
                except (OSError, ControlError):
                    pass
                engine.wait()
                cluster.start_engine(client_generation=reverts + 1)
            begun = time.monotonic()
            revert(cluster, name, keep)
            pauses.append(time.monotonic() - begun)
            assert revert(cluster, name, keep)["existed"] == "1"
            kept[keep] = before
            model = bytearray(kept[name])
            assert digest(cluster) == hashlib.sha256(model).hexdigest(), f"not {name}"
            wait_for(lambda: cluster.engine.status()["connections"] == "0", "the reader to be gone")

        def snap(name):
            change(cluster, model, chance)
            take(cluster, name)
            kept[name] = bytes(model)

        snap("a")
        snap("b")
        change(cluster, model, chance)
        back("a")
        snap("c")
        away.process.kill()
        cluster.engine.wait_state(away, "absent")
        change(cluster, model, chance)
        back("b")
        change(cluster, model, chance)
        delete(cluster, "kept-1")
        del kept["kept-1"]
        back("c")
        delete(cluster, "a")
        del kept["a"]
        away.start()
        cluster.engine.wait_state(away, "inSync")
        for name in ("b", "c", "kept-2"):
            change(cluster, model, chance, 20)
            back(name, dies=True)
        for name in chance.sample(sorted(kept), 3):
            delete(cluster, name)
            del kept[name]
        change(cluster, model, chance)
        for name, image in kept.items():
            assert digest(cluster, name) == hashlib.sha256(image).hexdigest(), f"{name} has changed"
        assert digest(cluster) == hashlib.sha256(model).hexdigest()
        layers = len(cluster.record().layers)
        for replica in cluster.replicas:
            wait_for(
                lambda: replica.status()["retiredLayers"] == "0",
                f"replica {replica.number} to be done with deleted layers", 60)
            assert replica.lasting_layers == layers, replica.status()
        cluster.check_copies()
        for replica in cluster.replicas:
            for name, image in kept.items():
                assert offline_digest(replica, name) == hashlib.sha256(image).hexdigest(), name
        return (f"{reverts} reverts, {len(kept)} snapshots left of {layers} layers, "
                f"longest answer {max(pauses) * 1e3:.0f} ms")


def test_a_revert_costs_nothing_and_gives_space_back(context):
    """96 MiB of changes are undone at once; what they took comes back when the kept snapshot goes."""
    with context.cluster(size=SIZE) as cluster:
        cluster.up()
        live = connect(cluster)
        live.pwrite(b"a" * MIB, 0)
        take(cluster, "golden")
        for offset in range(0, 96 * MIB, MIB):
            live.pwrite(b"b" * MIB, offset)
        live.flush()
        live.shutdown()
        wait_for(lambda: cluster.engine.status()["connections"] == "0", "the client to be gone")

        def blocks(replica):
            return sum(path.stat().st_blocks * 512
                       for path in (replica.directory / "layers").glob("*.data"))

        before = [blocks(replica) for replica in cluster.replicas]
        begun = time.monotonic()
        revert(cluster, "golden", "kept")
        pause = time.monotonic() - begun
        live = connect(cluster)
        assert live.pread(2 * MIB, 0) == b"a" * MIB + bytes(MIB)
        live.shutdown()
        assert [blocks(replica) for replica in cluster.replicas] == before
        delete(cluster, "kept")
        for replica in cluster.replicas:
            wait_for(lambda: blocks(replica) < 3 * MIB, "the space to come back", 120)
        cluster.check_copies()
        return f"96 MiB of changes undone in {pause * 1e3:.0f} ms, {before[0] // MIB} MiB given back"


def test_reverts_are_refused_with_the_reason(context):
    """While a client is connected, to what is not there, under a name that is taken."""
    with context.cluster(size=SIZE) as cluster:
        cluster.up()
        live = connect(cluster)
        live.pwrite(b"x" * BLOCK, 0)
        take(cluster, "first")
        live.pwrite(b"y" * BLOCK, 0)
        text = refusal(cluster, "first", "kept")
        assert "1 client is connected" in text, text
        assert live.pread(BLOCK, 0) == b"y" * BLOCK
        live.shutdown()
        wait_for(lambda: cluster.engine.status()["connections"] == "0", "the client to be gone")
        reader = connect(cluster, "first")  # reads a snapshot, and remembers nothing of the volume
        text = refusal(cluster, "unheard-of", "kept")
        assert "no snapshot 'unheard-of'" in text, text
        text = refusal(cluster, "first", "first")
        assert "choose another name" in text, text
        text = refusal(cluster, "../etc", "kept")
        assert "revert needs" in text, text
        revert(cluster, "first", "kept")
        assert reader.pread(BLOCK, 0) == b"x" * BLOCK
        reader.shutdown()
        live = connect(cluster)
        assert live.pread(BLOCK, 0) == b"x" * BLOCK
        live.shutdown()
        cluster.check_copies()
        return "refused, and done when it could be"


def test_revert_command(context):
    """Over the whole control plane: back and forth, and over attachments."""
    with Plane(context) as plane:
        plane.run("volume", "create", "vol", "--size", str(8 * MIB))
        plane.run("volume", "attach", "vol")
        first, second = plane.image(8 * MIB), plane.image(8 * MIB)
        contents = [first.read_bytes(), second.read_bytes()]
        plane.write(first)
        plane.run("snapshot", "create", "vol", "first")
        plane.write(second)
        assert "no snapshot" in plane.run(
            "snapshot", "revert", "vol", "other", "--yes", fails=True)
        kept = plane.run("snapshot", "revert", "vol", "first", "--keep", "second", "--yes")
        assert kept["name"] == "second" and kept["parent"] == "first", kept
        assert plane.read() == contents[0]
        plane.run("volume", "detach", "vol")
        plane.run("volume", "attach", "vol")
        assert plane.read() == contents[0]
        made_up = plane.run("snapshot", "revert", "vol", "second", "--yes")["name"]
        assert plane.read() == contents[1]
        plane.run("snapshot", "delete", "vol", made_up, "--yes")
        snapshots = plane.run("snapshot", "list", "vol")
        assert [s["name"] for s in snapshots] == ["first", "second"], snapshots
        assert [s["isVolumeParent"] for s in snapshots] == [False, True], snapshots
        # What the replicas say is told every second or so.
        def are_known():
            # A file system may need a block more to find the others.
            return [[round((s[key] or 0) / MIB, 1) for key in ("ownBytes", "cumulativeBytes")]
                    for s in plane.run("snapshot", "list", "vol")] == [[8, 8], [8, 16]]

        wait_for(are_known, "the sizes to be known")
        kinds = {event["kind"] for event in plane.run("events", "--limit", "500")}
        assert {"RevertRequested", "VolumeReverted"} <= kinds, kinds
        return "there and back"
