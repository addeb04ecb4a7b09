"""Snapshots beside the live volume: what they hold, on every replica, whatever dies meanwhile."""

import hashlib
import random
import subprocess
import time

import nbd

from harness.cluster import BINARIES, MIB, ControlError, control, wait_for
from harness.workload import BLOCK, History, Workload, check_all

SIZE = 128 * MIB


def connect(cluster, snapshot=None):
    handle = nbd.NBD()
    handle.set_export_name(f"volume@{snapshot}" if snapshot else "volume")
    handle.connect_unix(str(cluster.engine.unix))
    return handle


def take(cluster, name):
    return control(
        cluster.engine.control, "snapshot", name=name, created=int(time.time() * 1000))


def digest(cluster, snapshot=None):
    """SHA-256 of the export, as a client reads it."""
    handle, digest = connect(cluster, snapshot), hashlib.sha256()
    for offset in range(0, cluster.size, MIB):
        digest.update(handle.pread(MIB, offset))
    handle.shutdown()
    return digest.hexdigest()


def stock_digests(cluster, snapshot):
    """SHA-256 of the snapshot as `nbdcopy` and `qemu-img convert` write it to a file."""
    source = f"nbd+unix:///volume@{snapshot}?socket={cluster.engine.unix}"
    digests = []
    for command in (["nbdcopy"], ["qemu-img", "convert", "-f", "raw", "-O", "raw"]):
        copy = cluster.path / "copy.raw"
        subprocess.run([*command, source, copy], check=True)
        digests.append(hashlib.sha256(copy.read_bytes()).hexdigest())
        copy.unlink()
    return digests


def offline_digest(replica, snapshot):
    """SHA-256 of the snapshot, None: of the volume, as the stopped replica's files hold it."""
    image = subprocess.run(
        [BINARIES / "haptera-replica", "export", "--dir", replica.directory, "--output", "-",
         *(["--snapshot", snapshot] if snapshot else [])],
        check=True, stdout=subprocess.PIPE).stdout
    return hashlib.sha256(image).hexdigest()


def scribble(live, model, chance, count=60):
    """Writes and trims at random, to the volume and to the model."""
    for _ in range(count):
        offset = chance.randrange(SIZE // 512 - 64) * 512
        if chance.random() < 0.2:
            offset, length = offset // BLOCK * BLOCK, 4 * BLOCK
            live.trim(length, offset)
            model[offset:offset + length] = bytes(length)
        else:
            data = chance.randbytes(chance.randrange(1, 65) * 512)
            live.pwrite(data, offset)
            model[offset:offset + len(data)] = data


def test_snapshots_hold_what_was_written_before(context):
    """Byte for byte against a model: partial blocks, trims, several layers, a new engine."""
    with context.cluster(size=SIZE) as cluster:
        cluster.up()
        chance = random.Random(context.seed)
        model, kept = bytearray(SIZE), {}
        live = connect(cluster)
        for turn in range(5):
            scribble(live, model, chance)
            name = f"turn-{turn}"
            assert "existed" not in take(cluster, name)
            kept[name] = hashlib.sha256(model).hexdigest()
            assert take(cluster, name)["existed"] == "1"
            if turn == 2:
                live.shutdown()
                cluster.engine.process.kill()
                cluster.start_engine(client_generation=2)
                live = connect(cluster)
        live.shutdown()
        for name, expected in kept.items():
            assert digest(cluster, name) == expected, f"{name} is not what it was"
        assert digest(cluster) == hashlib.sha256(model).hexdigest()
        cluster.check_copies()
        for replica in cluster.replicas:
            for name, expected in kept.items():
                assert offline_digest(replica, name) == expected, f"{name} on {replica.number}"
        return f"{len(kept)} snapshots equal to the model, on NBD and on {len(cluster.replicas)} copies"


def test_snapshots_under_load_and_faults(context):
    """Taken under load, with a replica away and the engine killed: none ever changes."""
    with context.cluster(size=SIZE) as cluster:
        cluster.up()
        history = History(SIZE // 2 // BLOCK)
        load = Workload(history, cluster.engine.unix, context.seed).start()
        load.wait_completed(1000)
        kept, pauses = {}, []
        away = cluster.replicas[2]

        def snap(name):
            load.reset_gap()
            take(cluster, name)
            load.wait_completed(300)
            pauses.append(load.longest_gap)
            kept[name] = digest(cluster, name)

        snap("all")
        snap("again")
        away.process.kill()
        cluster.engine.wait_state(away, "absent")
        snap("without-1")
        snap("without-2")
        away.start()
        cluster.engine.wait_state(away, "inSync")
        snap("back")
        for name in ("again", "back"):
            for found in stock_digests(cluster, name):
                assert found == kept[name], f"a stock copy of {name} is not what the volume was"
        error = load.stop()
        assert error is None, f"the client got an error: {error}"
        cluster.engine.process.kill()
        cluster.start_engine(client_generation=2)
        check_all(history, cluster.engine.unix)
        for name, expected in kept.items():
            assert digest(cluster, name) == expected, f"{name} has changed"
        cluster.check_copies()
        for replica in cluster.replicas:
            for name, expected in kept.items():
                assert offline_digest(replica, name) == expected, f"{name} on {replica.number}"
        longest = max(pauses) * 1e3
        return f"{len(kept)} snapshots, {load.completed} requests, longest gap {longest:.0f} ms"


def test_snapshots_deleted_under_faults(context):
    """Deleted under load, with a replica killed while it merges, one away, and the engine killed:
    what is left never changes, and every replica gives layers and space back by itself."""
    with context.cluster(size=SIZE) as cluster:
        cluster.up()
        history = History(SIZE // 2 // BLOCK)
        load = Workload(history, cluster.engine.unix, context.seed).start()
        kept, gaps = {}, []

        def delete(name):
            load.reset_gap()
            assert "existed" not in control(cluster.engine.control, "delete-snapshot", name=name)
            load.wait_completed(300)
            gaps.append(load.longest_gap)
            kept.pop(name, None)

        for turn in range(6):
            load.wait_completed(500)
            take(cluster, f"s{turn}")
            kept[f"s{turn}"] = digest(cluster, f"s{turn}")
        reader = connect(cluster, "s1")
        refusal = expect_refusal(cluster, "s1")
        assert "1 client reads it" in refusal, refusal
        reader.shutdown()
        wait_for(
            lambda: cluster.engine.status()["snapshotReaders"] == "0", "the reader to be gone")
        delete("s1")
        delete("s0")  # the lowest
        away = cluster.replicas[1]
        away.process.kill()
        cluster.engine.wait_state(away, "absent")
        delete("s3")
        delete("s5")  # right below the head
        away.start()
        cluster.engine.wait_state(away, "inSync")
        assert control(cluster.engine.control, "delete-snapshot", name="s3")["existed"] == "0"
        error = load.stop()
        assert error is None, f"the client got an error: {error}"
        cluster.engine.process.kill()
        cluster.start_engine(client_generation=2)
        check_all(history, cluster.engine.unix)
        for replica in cluster.replicas:
            wait_for(
                lambda: replica.status()["retiredLayers"] == "0",
                f"replica {replica.number} to be done with deleted layers", 60)
            assert replica.lasting_layers == len(kept) + 1, replica.status()
            files = sorted(path.name for path in (replica.directory / "layers").iterdir())
            assert len(files) == 2 * int(replica.status()["layers"]), files
        for name, expected in kept.items():
            assert digest(cluster, name) == expected, f"{name} has changed"
        cluster.check_copies()
        for replica in cluster.replicas:
            for name, expected in kept.items():
                assert offline_digest(replica, name) == expected, f"{name} on {replica.number}"
        return f"{len(kept)} of 6 left, {load.completed} requests, longest gap {max(gaps) * 1e3:.0f} ms"


def expect_refusal(cluster, name):
    try:
        control(cluster.engine.control, "delete-snapshot", name=name)
        raise AssertionError("a snapshot in use was deleted")
    except ControlError as error:
        return str(error)


def test_deleting_the_lowest_moves_the_next(context):
    """The lowest snapshot holds most of the volume. To delete it moves what the next one holds; so
    does deleting that one and the next again, as retention does night after night."""
    with context.cluster(size=SIZE) as cluster:
        cluster.up()
        live, chance = connect(cluster), random.Random(context.seed)
        for offset in range(0, 64 * MIB, MIB):
            live.pwrite(chance.randbytes(MIB), offset)
        take(cluster, "night-0")
        views, moved = {}, []
        for night in range(1, 5):
            for _ in range(16):
                live.pwrite(chance.randbytes(64 << 10), chance.randrange(1000) * (64 << 10))
            live.trim(64 << 10, chance.randrange(1000) * (64 << 10))
            live.flush()
            take(cluster, f"night-{night}")
            views[f"night-{night}"] = digest(cluster, f"night-{night}")
            before = [int(replica.status()["mergedBytes"]) for replica in cluster.replicas]
            control(cluster.engine.control, "delete-snapshot", name=f"night-{night - 1}")
            for replica in cluster.replicas:
                wait_for(lambda: replica.status()["layers"] == "2", "the merge", 60)
            moved += [int(replica.status()["mergedBytes"]) - first
                      for replica, first in zip(cluster.replicas, before)]
            views.pop(f"night-{night - 1}", None)
            for name, view in views.items():
                assert digest(cluster, name) == view, name
        assert max(moved) <= MIB, moved
        live.flush()
        live.shutdown()
        cluster.check_copies()
        for replica in cluster.replicas:
            assert offline_digest(replica, "night-4") == views["night-4"]
        return f"64 MiB below, {max(moved) // 1024} KiB at most were moved a night"


def test_deleting_the_only_one_moves_nothing(context):
    """A backup takes a snapshot, reads it and deletes it, night after night. Nothing but what was
    written meanwhile is ever moved, and what that hides gives its space back."""
    with context.cluster(size=SIZE, replicas=2) as cluster:
        cluster.up()
        live, chance = connect(cluster), random.Random(context.seed)
        model = bytearray(SIZE)

        def write(offset, length):
            data = chance.randbytes(length)
            live.pwrite(data, offset)
            model[offset:offset + length] = data

        for offset in range(0, 64 * MIB, MIB):
            write(offset, MIB)
        for night in range(4):
            take(cluster, f"night-{night}")
            expected = hashlib.sha256(model).hexdigest()
            for _ in range(16):
                write(chance.randrange(1000) * (64 << 10), 64 << 10)
            live.trim(64 << 10, 0)
            model[:64 << 10] = bytes(64 << 10)
            live.flush()
            assert digest(cluster, f"night-{night}") == expected
            control(cluster.engine.control, "delete-snapshot", name=f"night-{night}")
            for replica in cluster.replicas:
                wait_for(
                    lambda: (replica.status()["retiredLayers"], replica.status()["stayingLayers"],
                             replica.status().get("reclaimableBytes")) == ("0", "1", "0"),
                    f"replica {replica.number} to have given back what is hidden", 60)
            if night == 1:
                replica = cluster.replicas[0]
                replica.process.kill()
                replica.start()
                cluster.engine.wait_state(replica, "inSync")
        moved = [int(replica.status()["mergedBytes"]) for replica in cluster.replicas]
        assert max(moved) <= 4 * MIB, moved
        for replica in cluster.replicas:
            assert replica.lasting_layers == 1, replica.status()
        live.shutdown()
        cluster.check_copies()
        held = []
        for replica in cluster.replicas:
            assert offline_digest(replica, None) == hashlib.sha256(model).hexdigest()
            held.append(sum(path.stat().st_blocks * 512
                            for path in (replica.directory / "layers").glob("*.data")))
        # What is shown, and no block twice.
        assert max(held) <= 65 * MIB, held
        return (f"64 MiB below, {max(moved) // 1024} KiB were moved in 4 nights, "
                f"{max(held) // 1024} KiB are held")


def test_a_snapshot_is_only_read(context):
    """Writes are refused, unknown names too; the connection stays usable."""
    with context.cluster(size=SIZE) as cluster:
        cluster.up()
        live = connect(cluster)
        live.pwrite(b"x" * BLOCK, 0)
        take(cluster, "first")
        live.pwrite(b"y" * BLOCK, 0)
        handle = connect(cluster, "first")
        assert handle.is_read_only()
        handle.set_strict_mode(0)
        for change in (lambda: handle.pwrite(b"z" * BLOCK, 0), lambda: handle.trim(BLOCK, 0)):
            try:
                change()
                raise AssertionError("a snapshot was changed")
            except nbd.Error as error:
                assert error.errno in ("EPERM", "EINVAL"), error
        assert handle.pread(BLOCK, 0) == b"x" * BLOCK
        assert live.pread(BLOCK, 0) == b"y" * BLOCK
        handle.shutdown()
        live.shutdown()
        try:
            connect(cluster, "unheard-of")
            raise AssertionError("an unknown snapshot is served")
        except nbd.Error:
            pass
        cluster.check_copies()
        return "read-only"
