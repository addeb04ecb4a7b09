"""Backups of what changed between snapshots, made with stock tools while the volume is written."""

import hashlib
import json
import random
import subprocess

import nbd

from harness.cluster import CONTROL_BINARIES, MIB, ControlError, control, wait_for
from harness.plane import Plane
from harness.workload import BLOCK, History, Workload, check_all
from test_snapshots import connect, digest, take

SIZE = 128 * MIB


def uri(cluster, snapshot=None):
    export = f"volume@{snapshot}" if snapshot else "volume"
    return f"nbd+unix:///{export}?socket={cluster.engine.unix}"


def tool(*words, **options):
    done = subprocess.run([str(word) for word in words], capture_output=True, timeout=300, **options)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


def changed(source, base, context="qemu:dirty-bitmap"):
    """(offset, length) of what `nbdinfo` says has changed since the snapshot `base`."""
    told = json.loads(tool("nbdinfo", f"--map={context}:{base}", "--json", source))
    return [(part["offset"], part["length"]) for part in told if part["type"] & 1]


def blocks(ranges):
    return {number for offset, length in ranges
            for number in range(offset // BLOCK, (offset + length) // BLOCK)}


def incremental(source, base, overlay, backing):
    """As docs/snapshots.md has it: what changed since `base`, as a qcow2 over the last backup."""
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", source, overlay)
    ranges = changed(source, base)
    step = 16 * MIB  # qemu-io takes less than 2 GiB at once
    reads = "".join(f"read -q {at} {min(step, offset + length - at)}\n"
                    for offset, length in ranges for at in range(offset, offset + length, step))
    tool("qemu-io", "-C", "-f", "qcow2", overlay, input=reads.encode())
    tool("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", backing, overlay)
    return sum(length for _, length in ranges)


def restored(image):
    raw = image.with_suffix(".raw")
    tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw)
    found = hashlib.sha256(raw.read_bytes()).hexdigest()
    raw.unlink()
    return found


def test_incremental_backups_restore(context):
    """A chain of qcow2 files, each with the changes of one snapshot: every link restores byte for
    byte what the snapshot was, though some snapshots are deleted in between, a replica is killed
    and comes back, and the engine is killed."""
    with context.cluster(size=SIZE) as cluster:
        cluster.up()
        history = History(SIZE // 2 // BLOCK)
        load = Workload(history, cluster.engine.unix, context.seed).start()
        chance = random.Random(context.seed)
        trims = connect(cluster)
        load.wait_completed(500)
        take(cluster, "s0")
        kept = {"s0": digest(cluster, "s0")}
        last = cluster.path / "s0.qcow2"
        tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri(cluster, "s0"), last)
        images, base, copied = {"s0": last}, "s0", []
        for turn in range(1, 7):
            # Beside the workload's half, data that is trimmed again: a change that leaves zeroes.
            for _ in range(20):
                place = SIZE // 2 + chance.randrange(SIZE // 2 // BLOCK - 64) * BLOCK
                trims.pwrite(chance.randbytes(8 * BLOCK), place)
                trims.trim(5 * BLOCK, SIZE // 2 + chance.randrange(SIZE // 2 // BLOCK - 8) * BLOCK)
            load.wait_completed(400)
            name = f"s{turn}"
            take(cluster, name)
            if turn == 2:
                away = cluster.replicas[1]
                away.process.kill()
                cluster.engine.wait_state(away, "absent")
            if turn == 4:
                away.start()  # it is being filled while the next are asked for
            if turn % 3 == 2:
                continue  # not backed up: gone before the next is, with its changes in the next
            if turn % 3 == 0:
                control(cluster.engine.control, "delete-snapshot", name=f"s{turn - 1}")
            kept[name] = digest(cluster, name)
            overlay = cluster.path / f"{name}.qcow2"
            copied.append(incremental(uri(cluster, name), base, overlay, last))
            images[name], last = overlay, overlay
            control(cluster.engine.control, "delete-snapshot", name=base)
            base = name
            if turn == 3:
                error = load.stop()
                assert error is None, f"the client got an error: {error}"
                trims.shutdown()
                cluster.engine.process.kill()
                cluster.start_engine(client_generation=2)
                check_all(history, cluster.engine.unix)
                trims = connect(cluster)
                load = Workload(history, cluster.engine.unix, context.seed + 1).start()
        error = load.stop()
        assert error is None, f"the client got an error: {error}"
        trims.shutdown()
        for name, image in images.items():
            assert restored(image) == kept[name], f"the backup of {name} is not what it was"
        cluster.wait_healthy()
        # The engine that serves has removed nobody: `away` was killed under the one before.
        removals = int(cluster.engine.metrics()["haptera_engine_replica_removals_total"])
        assert removals == 0, f"{removals} replicas were removed without a reason"
        cluster.check_copies()
        return f"{len(images)} backups, {sum(copied) // len(copied) // MIB} MiB changed each"


def test_what_changed_is_exact(context):
    """Where every write differs from what was there, what is told to have changed is what differs
    between the exports, and no more; through replicas that fail, and a snapshot deleted between."""
    with context.cluster(size=SIZE) as cluster:
        cluster.up()
        chance, live = random.Random(context.seed), connect(cluster)
        written = {}
        for turn in range(5):
            places = set()
            for _ in range(80):
                place = chance.randrange(SIZE // BLOCK)
                live.pwrite(chance.randbytes(BLOCK), place * BLOCK)
                places.add(place)
            name = f"s{turn}"
            take(cluster, name)
            written[name] = places
            if turn == 2:
                cluster.replicas[0].process.kill()
                cluster.engine.wait_state(cluster.replicas[0], "absent")
        control(cluster.engine.control, "delete-snapshot", name="s2")

        def expect(base, top, source):
            """What was written after `base` was taken and before `top` was."""
            expected = set().union(*(
                places for name, places in written.items() if base < name <= top))
            for context_name in ("qemu:dirty-bitmap", "haptera:changed"):
                found = blocks(changed(source, base, context_name))
                assert found == expected, (base, top, found ^ expected)
            return expected

        images = {name: connect(cluster, name).pread for name in written if name != "s2"}
        whole = {name: b"".join(read(MIB, at) for at in range(0, SIZE, MIB))
                 for name, read in images.items()}
        for base in images:
            for top in images:
                if base > top:
                    above = nbd.NBD()
                    above.add_meta_context(f"haptera:changed:{base}")
                    above.connect_uri(uri(cluster, top))
                    assert not above.can_meta_context(f"haptera:changed:{base}")
                    above.shutdown()
                    continue
                expected = expect(base, top, uri(cluster, top))
                differing = {at // BLOCK for at in range(0, SIZE, BLOCK)
                             if whole[base][at:at + BLOCK] != whole[top][at:at + BLOCK]}
                assert differing == expected, (base, top)
        expect("s3", "s9", uri(cluster))
        live.trim(BLOCK, 0)
        assert 0 in blocks(changed(uri(cluster), "s4")), "a trim is no change"
        live.shutdown()
        cluster.engine.process.kill()
        cluster.start_engine(client_generation=2)
        expect("s0", "s4", uri(cluster, "s4"))
        assert 0 in blocks(changed(uri(cluster), "s4")), "forgotten with the engine"
        return f"{len(images)} snapshots, every pair equal to a byte compare"


def test_several_contexts_and_deletion(context):
    """libnbd asks for several at once; a snapshot somebody compares with is not deleted."""
    with context.cluster(size=SIZE) as cluster:
        cluster.up()
        live = connect(cluster)
        live.pwrite(b"a" * BLOCK, 0)
        take(cluster, "first")
        live.pwrite(b"b" * BLOCK, BLOCK)
        take(cluster, "second")
        live.pwrite(b"c" * BLOCK, 2 * BLOCK)
        handle, names = nbd.NBD(), ["base:allocation", "haptera:changed:first",
                                    "qemu:dirty-bitmap:second", "haptera:changed:third"]
        for name in names:
            handle.add_meta_context(name)
        handle.set_export_name("volume")
        handle.connect_unix(str(cluster.engine.unix))
        assert [handle.can_meta_context(name) for name in names] == [True, True, True, False]
        told = {}
        handle.block_status(
            4 * BLOCK, 0, lambda name, offset, entries, error: told.update({name: list(entries)}))
        assert told == {
            "base:allocation": [3 * BLOCK, 0, BLOCK, 3],
            "haptera:changed:first": [BLOCK, 0, 2 * BLOCK, 1, BLOCK, 0],
            "qemu:dirty-bitmap:second": [2 * BLOCK, 0, BLOCK, 1, BLOCK, 0]}, told
        for name in ("first", "second"):
            try:
                control(cluster.engine.control, "delete-snapshot", name=name)
                raise AssertionError("a snapshot somebody compares with was deleted")
            except ControlError as error:
                assert "in use: 1 client reads it, or what changed since" in str(error), error
        handle.shutdown()
        live.shutdown()
        listed = json.loads(tool(
            "nbdinfo", "--json", uri(cluster, "first")))
        assert listed["exports"][0]["contexts"] == [
            "base:allocation", "haptera:changed:first", "qemu:dirty-bitmap:first"], listed
        wait_for(
            lambda: cluster.engine.status()["snapshotReaders"] == "0", "the reader to be gone")
        for name in ("first", "second"):
            control(cluster.engine.control, "delete-snapshot", name=name)
        return "refused while compared with"


def test_snapshot_commands(context):
    """diff, export and mount-info of storagectl, over the whole control plane."""
    with Plane(context) as plane:
        plane.run("volume", "create", "vol", "--size", str(SIZE))
        plane.run("volume", "attach", "vol")
        content = bytearray(SIZE)

        def write(offset, length):
            data = plane.random.randbytes(length)
            path = plane.directory / "data"
            path.write_bytes(data)
            plane.write(path, offset)
            content[offset:offset + length] = data

        write(MIB, 3 * MIB)
        plane.run("snapshot", "create", "vol", "a")
        first = bytes(content)
        write(2 * MIB, 8 * BLOCK)
        write(9 * MIB, BLOCK)
        plane.run("snapshot", "create", "vol", "b")
        write(5 * MIB, BLOCK)
        diff = plane.run("snapshot", "diff", "vol", "a", "b")
        assert diff["ranges"] == [
            {"offset": 2 * MIB, "length": 8 * BLOCK}, {"offset": 9 * MIB, "length": BLOCK}], diff
        assert (diff["changedBytes"], diff["sizeBytes"], diff["to"]) == (9 * BLOCK, SIZE, "b"), diff
        now = plane.run("snapshot", "diff", "vol", "a", "--summary")
        assert (now["changedBytes"], now["rangeCount"], now["ranges"], now["to"]) == (
            10 * BLOCK, 3, None, None), now
        for words, expected in (
                (("diff", "vol", "b", "a"), "taken after"),
                (("diff", "vol", "a", "c"), "no snapshot 'c'"),
                (("diff", "other", "a"), "no volume"),
                (("mount-info", "vol", "c"), "no snapshot 'c'")):
            error = plane.run("snapshot", *words, fails=True)
            assert expected in error, (words, error)

        raw, qcow2 = plane.directory / "a.raw", plane.directory / "a.qcow2"
        plane.run("snapshot", "export", "vol", "a", str(raw))
        assert raw.read_bytes() == first
        assert raw.stat().st_blocks * 512 < 4 * MIB, "not sparse"
        plane.run("snapshot", "export", "vol", "a", str(qcow2), "--format", "qcow2")
        tool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, qcow2)
        assert "is there already" in plane.run(
            "snapshot", "export", "vol", "b", str(raw), fails=True)
        assert raw.read_bytes() == first
        plane.run("snapshot", "export", "vol", "b", str(raw), "--force")
        assert raw.read_bytes() != first
        assert tool(
            CONTROL_BINARIES / "storagectl", "snapshot", "export", "vol", "a", "-",
            env=plane.environment) == first
        streamed = plane.directory / "streamed.qcow2"
        streamed.write_bytes(tool(
            CONTROL_BINARIES / "storagectl", "snapshot", "export", "vol", "a", "-", "--format",
            "qcow2", env={**plane.environment, "TMPDIR": str(plane.directory)}))
        tool("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", qcow2, streamed)
        assert not list(plane.directory.glob("haptera-export-*"))
        assert not list(plane.directory.glob("*.partial*"))
        info = plane.run("snapshot", "mount-info", "vol", "a")
        assert info["uri"].endswith("/vol@a") and info["uri"].startswith("nbd://"), info
        assert "qemu-nbd --snapshot" in info["commands"]["attach"], info
        plane.run("volume", "detach", "vol")
        assert "not attached" in plane.run("snapshot", "diff", "vol", "a", fails=True)
        return f"{diff['changedBytes']} bytes"
