"""Replicas that come back: what is copied, and that it is copied whoever dies meanwhile."""

import random

import nbd

from harness.cluster import GIB, MIB, wait_for
from harness.workload import BLOCK, History, Workload, check_all, content


def connect(cluster):
    handle = nbd.NBD()
    handle.set_export_name("volume")
    handle.connect_unix(str(cluster.engine.unix))
    return handle


def write(handle, history, first, count):
    version = history.issue(first, count, False)
    data = b"".join(content(b, version) for b in range(first, first + count))
    handle.pwrite(data, first * BLOCK)
    history.acknowledge(first, count, version)


def copied(cluster):
    return int(cluster.engine.metrics()["haptera_engine_rebuilt_bytes_total"])


def test_returning_replica_is_filled_by_delta(context):
    """Only what changed while it was away is sent, though the volume holds much more."""
    with context.cluster(size=4 * GIB) as cluster:
        cluster.up()
        cluster.wait_healthy()
        spread = random.Random(context.seed)
        regions = sorted(spread.sample(range(4 * GIB // MIB), 300))
        history = History(4 * GIB // BLOCK)
        with_client = connect(cluster)
        for region in regions:
            write(with_client, history, region * 256, 256)
        with_client.flush()
        away = cluster.replicas[0]
        before = copied(cluster)
        away.process.kill()
        cluster.engine.wait_state(away, "absent")
        changed = set()
        for region in spread.sample(regions, 60):
            for block in spread.sample(range(256), 8):
                write(with_client, history, region * 256 + block, 1)
                changed.add(region * 256 + block)
        away.start()
        cluster.engine.wait_state(away, "inSync")
        sent = copied(cluster) - before
        assert sent <= 1.2 * len(changed) * BLOCK, f"{sent} bytes for {len(changed)} blocks"
        assert sent >= len(changed) * BLOCK, f"{sent} bytes for {len(changed)} blocks"
        with_client.shutdown()
        log = cluster.engine.process.log.read_text()
        assert "sinceEpoch=0" not in log, "it was compared in full"
        cluster.check_copies()
        return f"{len(changed)} blocks changed, {sent // BLOCK} sent"


def test_rebuild_goes_on_after_its_engine_is_killed(context):
    """A new replica is half filled when the engine dies under load; the next one finishes it."""
    with context.cluster(size=2 * GIB) as cluster:
        cluster.up()
        cluster.wait_healthy()
        history = History(2 * GIB // BLOCK)
        with_client = connect(cluster)
        for region in range(512):
            write(with_client, history, region * 256, 256)
        with_client.shutdown()
        replaced = cluster.replicas[1]
        replaced.process.kill()
        cluster.engine.wait_state(replaced, "absent")
        replaced.recreate()
        load = Workload(history, cluster.engine.unix, context.seed).start()
        replaced.start()
        # No more than that: what changes meanwhile must be sent again by right.
        load.wait_completed(200)
        assert load.stop() is None

        def half_filled():
            status = cluster.engine.status()
            done = int(status.get("rebuild.regionsDone", 0))
            total = int(status.get("rebuild.regionsTotal", 0))
            assert status.get("rebuild.kind", "rebuild") == "rebuild"
            return total > 0 and done * 2 > total and done < total
        wait_for(half_filled, "half of the regions to be copied", 120)
        first = copied(cluster)
        load = Workload(history, cluster.engine.unix, context.seed + 2).start()
        load.wait_completed(50)
        cluster.engine.process.kill()
        load.join()
        cluster.start_engine()
        load = Workload(history, cluster.engine.unix, context.seed + 1).start()
        load.wait_completed(200)
        assert load.stop() is None
        cluster.wait_healthy()
        # What the first engine had copied was found equal.
        sent = copied(cluster)
        assert first > 128 * MIB, f"{first} bytes sent by the first engine"
        assert first + sent < 576 * MIB, f"{first} and {sent} bytes sent of 512 MiB"
        check_all(history, cluster.engine.unix)
        cluster.check_copies()
        return f"{first // MIB} MiB sent by the first engine, {sent // MIB} MiB by the second"
