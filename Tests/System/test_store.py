"""The metadata store away: a healthy volume does not notice, a change of members waits."""

import signal
import time

from harness.cluster import MIB, wait_for
from harness.workload import BLOCK, History, Workload, check_all

LOADED = 64 * MIB // BLOCK


def test_store_down_while_healthy(context):
    with context.cluster() as cluster:
        cluster.up()
        history = History(LOADED)
        load = Workload(history, cluster.engine.unix, context.seed).start()
        load.wait_completed(500)
        epoch = cluster.record().epoch
        cluster.store.stop()
        load.reset_gap()
        load.wait_completed(5000)
        gap = load.longest_gap
        cluster.store.start()
        assert load.stop() is None
        assert cluster.record().epoch == epoch, "something changed the record"
        check_all(history, cluster.engine.unix)
        cluster.check_copies()
        return f"5000 requests without the store, longest gap {gap * 1e3:.0f} ms"


def test_store_down_during_a_loss(context):
    """A member lost while the store is away: writes wait for the record, then go on."""
    with context.cluster() as cluster:
        cluster.up()
        history = History(LOADED)
        load = Workload(
            history, cluster.engine.unix, context.seed, writes_only=True).start()
        load.wait_completed(500)
        cluster.store.stop()
        # Stopped first: what all had acknowledged has arrived when every write waits.
        lost = cluster.replicas[0].process
        lost.signal(signal.SIGSTOP)
        wait_for(lambda: load.silence > 1.5, "every write to wait")
        before = load.completed
        lost.kill()
        wait_for(
            lambda: cluster.engine.status().get("storeAvailable") in ("false", "0", "no"),
            "the engine to miss the store")
        # Everything in flight lacks the lost member; nothing may be acknowledged.
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            assert load.completed == before, "a write was acknowledged without the record"
            time.sleep(0.05)
        cluster.store.start()
        load.wait_completed(500)
        error = load.stop()
        assert error is None, f"the client got an error: {error}"
        assert len(cluster.record().in_sync) == 2
        check_all(history, cluster.engine.unix)
        cluster.replicas[0].start()
        cluster.wait_healthy()
        cluster.check_copies()


def test_store_refuses_changes(context):
    """A refused joiner costs nobody anything: the next member lost is removed as ever. A refused
    removal ends the engine, which says why, and the next one serves."""
    with context.cluster() as cluster:
        cluster.up()
        history = History(LOADED)
        cluster.replicas[2].process.kill()
        wait_for(lambda: len(cluster.record().in_sync) == 2, "the removal")
        cluster.store.objection = lambda proposed: "no such joiner" if proposed.joining else None
        cluster.replicas[2].start()
        wait_for(lambda: cluster.store.refused > 0, "a refused joiner")
        load = Workload(history, cluster.engine.unix, context.seed, writes_only=True).start()
        load.wait_completed(500)
        cluster.replicas[1].process.kill()
        wait_for(lambda: len(cluster.record().in_sync) == 1, "the removal beside it")
        load.wait_completed(500)
        error = load.stop()
        assert error is None, f"the client got an error: {error}"
        log = cluster.engine.process.log.read_text()
        assert "refuses a change of the record" in log and "no such joiner" in log, log[-1000:]
        cluster.store.objection = lambda proposed: None
        cluster.replicas[1].start()
        cluster.wait_healthy()
        cluster.store.objection = (
            lambda proposed: "keep all" if len(proposed.in_sync) < 3 else None)
        cluster.replicas[0].process.kill()
        engine = cluster.engine.process
        assert engine.wait(30) == 1
        assert "keep all" in cluster.tail(engine), cluster.tail(engine)
        cluster.store.objection = lambda proposed: None
        cluster.replicas[0].start()
        cluster.start_engine(client_generation=2)
        cluster.wait_healthy()
        check_all(history, cluster.engine.unix)
        cluster.check_copies()


def test_attach_waits_for_the_store(context):
    with context.cluster() as cluster:
        cluster.up()
        cluster.engine.detach()
        cluster.store.stop()
        engine = cluster.start_engine(wait=False)
        wait_for(engine.control.exists, "the engine's control socket")
        assert not engine.is_serving()
        cluster.store.start()
        engine.wait_serving()
        cluster.check_copies()


def test_store_restored_from_an_old_copy(context):
    """A record older than what replicas promised is never built upon: the engine stops and says so."""
    with context.cluster() as cluster:
        cluster.up()
        old = cluster.record()
        lost = cluster.replicas[0]
        lost.process.kill()
        wait_for(lambda: len(cluster.record().in_sync) == 2, "the removal")
        lost.start()
        cluster.wait_healthy()
        cluster.engine.detach()
        cluster.store.put(old)
        engine = cluster.start_engine(wait=False)
        wait_for(lambda: not engine.process.is_running, "the engine to stop")
        assert engine.process.wait() == 1
        assert "later epoch" in cluster.tail(engine.process), cluster.tail(engine.process)
