"""Scrub: damage at rest is found in every layer and repaired, beside clients, over a new engine."""

import random
import time

from harness.cluster import MIB, control, wait_for
from harness.workload import BLOCK, History, SyncProbe, Workload, check_all
from test_snapshots import digest, offline_digest, take

SIZE = 256 * MIB
FIELDS = ("id", "region", "checked", "bad", "repaired", "lost", "skipped")


def scrub(cluster, id=1, start=None):
    control(cluster.engine.control, "scrub", **{"from": start or f"{id}:0:0:0:0:0:0"})


def progress(cluster):
    """What the engine says of its scrub, and in which state it is."""
    status = cluster.engine.status()
    found = dict(zip(FIELDS, map(int, status["scrub"].split(":"))))
    return found, status["scrub.state"]


def finish(cluster, timeout=180):
    wait_for(lambda: progress(cluster)[1] == "finished", "the scrub's end", timeout)
    return progress(cluster)[0]


def layer_file(replica, number):
    """The data file of the replica's layer, counted from the lowest."""
    return sorted((replica.directory / "layers").glob("*.data"))[number]


def flip(replica, number, blocks, chance):
    """One bit of each of the blocks, while the replica runs."""
    with open(layer_file(replica, number), "r+b", buffering=0) as file:
        for block in blocks:
            file.seek(block * BLOCK + chance.randrange(BLOCK))
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1 << chance.randrange(8)]))


def written(history):
    return [b for b in range(history.blocks) if history.acknowledged[b]]


def fill(cluster, history, seed, count):
    load = Workload(history, cluster.engine.unix, seed, writes_only=True).start()
    load.wait_completed(count)
    assert load.stop() is None
    return load


def test_scrub_repairs_head_and_frozen_layer(context):
    """Bits flipped in a running volume, in both layers and on every replica, never both at once."""
    with context.cluster(size=SIZE) as cluster:
        cluster.up()
        chance, history = random.Random(context.seed), History(4096)
        fill(cluster, history, context.seed, 1500)
        take(cluster, "before")
        kept, frozen = digest(cluster, "before"), written(history)
        fill(cluster, history, context.seed + 1, 400)
        live = digest(cluster)
        victims = chance.sample(frozen, 60)
        for number, replica in enumerate(cluster.replicas):
            flip(replica, 0, victims[number::3], chance)
        with open(layer_file(cluster.replicas[1], 1), "rb") as file:
            # What the head itself holds: blocks there that are not zero.
            head = [b for b in range(history.blocks)
                    if file.seek(b * BLOCK) is not None and any(file.read(BLOCK))]
        flip(cluster.replicas[1], 1, chance.sample(head, 20), chance)
        scrub(cluster)
        found = finish(cluster)
        assert found["bad"] == found["repaired"] == 80 and found["lost"] == 0, found
        scrub(cluster, id=2)
        assert finish(cluster)["bad"] == 0
        assert digest(cluster) == live and digest(cluster, "before") == kept
        check_all(history, cluster.engine.unix)
        cluster.engine.detach()
        for replica in cluster.replicas:
            replica.shutdown()
        assert {offline_digest(replica, "before") for replica in cluster.replicas} == {kept}
        for replica in cluster.replicas:
            replica.verify()
        return f"{found['checked']} blocks checked, {found['repaired']} repaired"


def test_scrub_goes_on_with_the_next_engine(context):
    """The engine is killed half-way: with its last word the next one does the rest."""
    with context.cluster(size=SIZE) as cluster:
        cluster.up()
        chance, history = random.Random(context.seed), History(SIZE // BLOCK)
        fill(cluster, history, context.seed, 3000)
        scrub(cluster)
        wait_for(lambda: progress(cluster)[0]["region"] > 40, "some regions", 60)
        last = cluster.engine.status()["scrub"]
        cluster.engine.process.kill()
        cluster.start_engine(client_generation=2)
        wait_for(lambda: cluster.engine.status()["unresolvedRegions"] == "0", "equal copies")
        region, checked = map(int, last.split(":")[1:3])
        early = [b for b in written(history) if b * BLOCK < region * MIB][:3]
        late = [b for b in written(history) if b * BLOCK >= region * MIB][-5:]
        flip(cluster.replicas[2], 0, early + late, chance)
        scrub(cluster, start=last)
        found = finish(cluster)
        assert found["repaired"] == len(late) and found["region"] == SIZE // MIB, found
        assert region > 40 and found["checked"] > checked
        scrub(cluster, id=2)
        assert finish(cluster)["repaired"] == len(early)
        cluster.check_copies()


def test_scrub_beside_clients(context):
    """Longest gap and speed of a scrub under load, and the same load without."""
    with context.cluster(size=SIZE) as cluster, SyncProbe(cluster.path) as probe:
        cluster.up()
        chance, history = random.Random(context.seed), History(SIZE // BLOCK)
        load = Workload(history, cluster.engine.unix, context.seed).start()
        load.wait_completed(4000)
        load.reset_gap()
        before = time.monotonic()
        load.wait_completed(3000, 120)
        alone, rate_alone = load.longest_gap, 3000 / (time.monotonic() - before)
        flip(cluster.replicas[0], 0, chance.sample(written(history), 50), chance)
        load.reset_gap()
        probe.reset_stall()
        scrub(cluster)
        begun = time.monotonic()
        found = finish(cluster)
        seconds = time.monotonic() - begun
        beside, stall = load.longest_gap, probe.longest_stall
        error = load.stop()
        assert error is None, f"the client got an error: {error}"
        assert found["lost"] == found["skipped"] == 0 and found["bad"] == found["repaired"]
        assert beside < 2 + 2 * min(stall, 1), f"a gap of {beside} s, the longest stall was {stall} s"
        check_all(history, cluster.engine.unix)
        scrub(cluster, id=2)
        assert finish(cluster)["bad"] == 0
        cluster.check_copies()
        speed = found["checked"] * BLOCK / MIB / seconds
        return (f"{speed:.0f} MiB/s over all copies, longest gap {beside * 1000:.0f} ms"
                f" ({alone * 1000:.0f} ms without), {found['repaired']} blocks repaired"
                f" by the scrub; {rate_alone:.0f} requests/s without")
