"""What deleting a snapshot is said to give back, against what it does: blocks of the files."""

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import time

from harness.cluster import BINARIES, MIB, control, wait_for
from harness.context import once
from harness.plane import Plane
from harness.workload import BLOCK
from test_clones import Volumes
from test_snapshots import connect, take

SIZE = 96 * MIB
# File systems keep some of their own blocks with a file's: of its extents.
SLACK = 16 * BLOCK


def allocated(replica):
    """What the data files take."""
    return sum(path.stat().st_blocks * 512 for path in (replica.directory / "layers").glob("*.data"))


def by_layer(text):
    return {int(layer): int(count) for layer, count in
            (part.split(":") for part in text.split(",") if part)}


def settle(replica, stuck=0, timeout=90):
    """Everything is counted and given back, but for so many layers that clones keep; the
    replica's status."""
    layers = len(replica.cluster.record().layers)

    def is_settled():
        status = replica.status()
        staying = int(status["stayingLayers"])
        done = (status["layers"], status["retiredLayers"]) == (
            str(layers + stuck + staying), str(stuck))
        if done and status["sizes"] == "counted" and status.get("reclaimableBytes") == "0":
            return status
        return None

    return wait_for(is_settled, f"replica {replica.number} to settle", timeout)


def predictions(cluster, replica, **options):
    """By snapshot, what deleting it gives back, at rest."""
    status = settle(replica, **options)
    exclusive = by_layer(status["exclusiveBytes"])
    return {name: exclusive[layer] for layer, _, name in cluster.record().snapshots}


def delete_as_predicted(cluster, name, predicted, was_killed=False):
    """Deletes the snapshot; what comes back is what was predicted, by replica. Returns that.

    `was_killed`: a replica that was killed between the draining of a region and giving its space
    back has forgotten to (docs/formats.md): then more may come back with the layer."""
    before = {replica.number: allocated(replica) for replica in cluster.replicas}
    control(cluster.engine.control, "delete-snapshot", name=name)
    for replica in cluster.replicas:
        settle(replica)
        given = before[replica.number] - allocated(replica)
        expected = predicted[replica.number][name]
        assert given - expected >= -SLACK and (was_killed or given - expected <= SLACK), (
            f"{name} on replica {replica.number}: {given // BLOCK} blocks came back "
            f"instead of {expected // BLOCK}")
    return predicted[cluster.replicas[0].number][name]


def change(live, chance, writes=40, trims=6):
    """Random writes and trims, and one that every change has in common: the changes of two
    layers alone may have no block in common (one in a few dozen pairs), and then the lower one
    would give nothing back."""
    for _ in range(writes):
        live.pwrite(chance.randbytes(BLOCK * chance.randrange(1, 40)),
                    chance.randrange(SIZE // BLOCK - 40) * BLOCK)
    for _ in range(trims):
        live.trim(BLOCK * chance.randrange(1, 300), chance.randrange(SIZE // BLOCK - 300) * BLOCK)
    live.pwrite(chance.randbytes(8 * BLOCK), 0)
    live.flush()


@once
def test_what_a_snapshot_gives_back_is_known_before(context):
    """The middle one, the lowest, the one below the head, what a revert has kept: with replicas
    killed in between, who count again."""
    with context.cluster(size=SIZE, replicas=2) as cluster:
        cluster.up()
        live, chance = connect(cluster), random.Random(context.seed)
        for offset in range(0, SIZE, MIB):
            live.pwrite(chance.randbytes(MIB), offset)
        change(live, chance)
        for number in range(6):
            take(cluster, f"s{number}")
            change(live, chance)

        def predict():
            return {replica.number: predictions(cluster, replica) for replica in cluster.replicas}

        predicted = predict()
        assert all(count > 0 for count in predicted[1].values()), predicted
        assert predicted[1] == predicted[2], predicted
        back = []
        for name in ("s2", "s0", "s5"):
            back.append(delete_as_predicted(cluster, name, predicted))
            predicted = predict()
        # A process that begins anew says nothing before it has counted, and then the same.
        for replica in cluster.replicas:
            replica.process.kill()
            replica.start()
            cluster.engine.wait_state(replica, "inSync")
            assert predictions(cluster, replica) == predicted[replica.number]
        live.shutdown()
        wait_for(lambda: cluster.engine.status()["connections"] == "0", "the client to be gone")
        control(cluster.engine.control, "revert", snapshot="s3", keep="kept",
                created=int(time.time() * 1000))
        live = connect(cluster)
        change(live, chance)
        predicted = predict()
        # s3 has what both lines come from.
        assert predicted[1]["s3"] == 0, predicted
        for name in ("s3", "kept", "s4", "s1"):
            back.append(delete_as_predicted(cluster, name, predicted))
            predicted = predict()
        live.shutdown()
        cluster.check_copies()
        return "came back as predicted: " + ", ".join(f"{count // 1024} KiB" for count in back)


def clone(cluster, replica, name, folder="clone", **changes):
    """A directory with a clone of the snapshot, which nobody serves."""
    record = cluster.record()
    layer, created, _ = next(s for s in record.snapshots if s[2] == name)
    directory = cluster.path / f"{folder}-{replica.number}"
    directory.mkdir()
    first = dataclasses.replace(
        record, **{"volume": os.urandom(16), **changes}, name="clone", epoch=record.epoch + 1000, engine=0,
        endpoint="", clean=1, change=0, joining=[], out=[], lineage=[], layers=[layer, layer + 1],
        growths=[], reverts=[], snapshots=[(layer, created, name)],
        in_sync=[(replica.id, replica.incarnation)])
    shared = control(
        replica.control, "share", layer=layer, into=directory.name, epoch=first.epoch)
    subprocess.run(
        [BINARIES / "haptera-replica", "clone", "--dir", directory, "--record",
         first.encode().hex(), "--replica-id", replica.text, "--incarnation",
         f"{replica.incarnation:016x}", "--layers", shared["layers"], "--size", shared["size"],
         "--log-index", shared["logIndex"]], check=True)
    return directory


@once
def test_what_a_clone_shares_is_not_given_back(context):
    """Nothing of what it shares is promised while it does, and nothing comes back. What is hidden
    there is named, and comes back when the clone has gone."""
    with context.cluster(size=SIZE, replicas=2) as cluster:
        cluster.up()
        live, chance = connect(cluster), random.Random(context.seed)
        for offset in range(0, SIZE, MIB):
            live.pwrite(chance.randbytes(MIB), offset)
        for name in ("low", "middle", "high"):
            take(cluster, name)
            change(live, chance)
        replica, other = cluster.replicas
        before = predictions(cluster, replica)
        directory = clone(cluster, replica, "middle")
        predicted = predictions(cluster, replica)
        # high is above what the clone has, and is merged as ever.
        assert predicted == {**before, "low": 0, "middle": 0}, (before, predicted)
        assert predictions(cluster, other) == before
        taken = allocated(replica)
        for name in ("low", "middle"):
            control(cluster.engine.control, "delete-snapshot", name=name)
        settle(other)
        status = settle(replica, stuck=2)
        assert taken - allocated(replica) == 0, (taken, allocated(replica))
        hidden = int(status["stuckBytes"])
        assert hidden > 0, status
        shutil.rmtree(directory)
        after = settle(replica)
        assert after["stuckBytes"] == "0", after
        given = taken - allocated(replica)
        assert abs(given - hidden) <= SLACK, (given, hidden)
        predicted = {r.number: predictions(cluster, r) for r in cluster.replicas}
        assert predicted[1] == predicted[2], predicted
        delete_as_predicted(cluster, "high", predicted)
        live.shutdown()
        cluster.check_copies()
        return f"{hidden // 1024} KiB were stuck"


def test_sizes_of_a_volume(context):
    """As `storagectl` shows them: sums over the replicas, less what a clone has; nothing while one
    has not said."""
    with Plane(context) as plane:
        volumes, chance = Volumes(plane), random.Random(context.seed)
        volumes.create("vol", "--size", str(SIZE))
        plane.run("volume", "attach", "vol")
        volumes.write("vol", chance.randbytes(8 * MIB))
        plane.run("snapshot", "create", "vol", "first")
        volumes.write("vol", chance.randbytes(2 * MIB), MIB)

        def shown(what):
            volume = volumes.show("vol")
            sizes = [volume[key] for key in (
                "allocatedBytes", "exclusiveBytes", "reclaimableBytes", "stuckBytes")]
            return sizes if None not in sizes and what(*sizes) else None

        def files():
            return sum(path.stat().st_blocks * 512 for directory in volumes.directories("vol")
                       for path in directory.rglob("*"))

        sizes = wait_for(
            lambda: shown(lambda taken, own, back, stuck: abs(taken - files()) <= SLACK
                          and taken == own), "the replicas' files to be shown")
        assert sizes[2:] == [0, 0], sizes
        snapshot = wait_for(
            lambda: next((s for s in plane.run("snapshot", "list", "vol")
                          if s["exclusiveBytes"] == 2 * MIB), None), "2 MiB to be exclusive")
        assert snapshot["ownBytes"] == 8 * MIB, snapshot
        volumes.create("copy", "--from", "vol@first")
        shared = sum(
            (directory / "layers" / f"1.{kind}").stat().st_blocks * 512
            for directory in volumes.directories("vol") for kind in ("data", "table"))
        wait_for(lambda: shown(lambda taken, own, back, stuck: taken - own == shared),
                 "what the clone has to be shared")
        wait_for(lambda: plane.run("snapshot", "show", "vol", "first")["exclusiveBytes"] == 0,
                 "the snapshot to give nothing back")
        plane.run("snapshot", "delete", "vol", "first", "--yes")
        wait_for(lambda: shown(lambda taken, own, back, stuck: (back, stuck) == (0, 6 * MIB)),
                 "what the clone keeps to be stuck")
        # One that does not answer.
        pid = volumes.show("vol")["replicas"][0]["pid"]
        os.kill(pid, signal.SIGKILL)
        plane.run("volume", "delete", "copy")
        wait_for(lambda: shown(lambda taken, own, back, stuck: taken == own
                               and (back, stuck) == (0, 0)), "the clone's space to be back", 60)
        wait_for(lambda: shown(lambda taken, own, back, stuck: abs(taken - files()) <= SLACK
                               and taken <= sizes[0] - 6 * MIB + SLACK), "less to be taken")
        return f"{sizes[0] // MIB} MiB on three replicas, {shared // MIB} MiB of it shared"
