"""Processes killed, stopped and replaced under load."""

import contextlib
import os
import pathlib
import signal
import socket

from chaos.gaps import Gap
from harness.cluster import MIB, wait_for
from harness.workload import BLOCK, History, SyncProbe, Workload, check_all
from test_gaps import in_time

LOADED = 64 * MIB // BLOCK


def lose_one_under_load(context, end):
    """`end` ends a replica's process: no client error, it comes back by delta, and all copies are
    equal. The pause, which must be short."""
    with context.cluster() as cluster, SyncProbe(cluster.path) as probe:
        cluster.up()
        history = History(LOADED)
        load = Workload(history, cluster.engine.unix, context.seed).start()
        load.wait_completed(2000)
        lost = cluster.replicas[1]
        load.reset_gap()
        probe.reset_stall()
        end(lost.process)
        wait_for(lambda: len(cluster.record().in_sync) == 2, "its removal")
        load.wait_completed(2000)
        p99 = probe.p99()
        gap = Gap(load.longest_gap, max(0.1, 5 * p99), f"fdatasync p99 {p99 * 1e3:.1f} ms",
                  probe.longest_stall)
        assert cluster.record().epoch >= 3
        lost.start()
        cluster.engine.wait_state(lost, "inSync")
        load.wait_completed(1000)
        error = load.stop()
        assert error is None, f"the client got an error: {error}"
        assert "sinceEpoch=0" not in cluster.engine.process.log.read_text(), "compared in full"
        check_all(history, cluster.engine.unix)
        cluster.check_copies()
        return gap


def test_replica_killed_under_load(context):
    return in_time(lose_one_under_load, context, lambda process: process.kill())


def test_everything_killed_under_load(context):
    """All replicas and the engine at once, round after round: what was acknowledged is there."""
    with context.cluster() as cluster:
        cluster.up()
        history = History(LOADED)
        completed = flushes = 0
        for turn in range(context.rounds):
            load = Workload(history, cluster.engine.unix, context.seed + turn).start()
            load.wait_completed(500 + context.seed % 700)
            for process in cluster.processes():
                process.signal(signal.SIGKILL)
            for process in cluster.processes():
                process.wait()
            load.join()
            completed, flushes = completed + load.completed, flushes + load.flushes
            cluster.start_replicas()
            cluster.start_engine(client_generation=turn + 2)
            check_all(history, cluster.engine.unix)
        cluster.wait_healthy()
        check_all(history, cluster.engine.unix)
        cluster.check_copies()
        return f"{context.rounds} rounds, {completed} requests, {flushes} flushes"


def test_engine_killed_under_load(context):
    """A new engine takes over from living replicas; nothing acknowledged is lost."""
    with context.cluster() as cluster:
        cluster.up()
        history = History(LOADED)
        for turn in range(3):
            load = Workload(history, cluster.engine.unix, context.seed + turn).start()
            load.wait_completed(1000)
            cluster.engine.process.kill()
            load.join()
            cluster.start_engine()
            check_all(history, cluster.engine.unix)
        cluster.wait_healthy()
        cluster.check_copies()


def test_addresses_of_the_dead_are_waited_for(context):
    """A killed process's ring closes its sockets a little after the process is gone: the next one
    found its address in use and gave up (once in test_gap_engine_killed)."""
    with context.cluster(replicas=1) as cluster:
        cluster.up()
        before, replica = cluster.engine, cluster.replicas[0]
        before.process.kill()
        replica.process.kill()
        with listening(replica.port):
            replica.spawn()
            wait_for(lambda: has_open(replica.process.pid, ".data"), "its files to be open")
        wait_for(replica.answers, "the replica to answer")
        with listening(before.port):
            engine = cluster.start_engine(before=before)
            assert not engine.status().get("unixURI")
        wait_for(lambda: engine.status().get("unixURI"), "the engine to listen")
        load = Workload(History(LOADED), engine.unix, context.seed).start()
        load.wait_completed(100)
        assert load.stop() is None


def has_open(pid, suffix):
    for entry in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            if os.readlink(entry).endswith(suffix):
                return True
    return False


def listening(port):
    """Holds the port, as one who is gone and whose socket is not."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    wait_for(lambda: is_bound(holder, port), "the port to be free")
    holder.listen(1)
    return holder


def is_bound(holder, port):
    with contextlib.suppress(OSError):
        holder.bind(("127.0.0.1", port))
        return True
    return False


def test_engine_is_fenced(context):
    """A second engine takes the volume; the first acknowledges no write from then on."""
    with context.cluster() as cluster:
        cluster.up()
        first, history = cluster.engine, History(LOADED)
        load = Workload(history, first.unix, context.seed, writes_only=True).start()
        load.wait_completed(500)
        second = cluster.start_engine(client_generation=2)
        # Whatever the first still acknowledges, it acknowledges before the second serves.
        wait_for(lambda: not first.process.is_running, "the first engine to stop")
        load.join()
        check_all(history, second.unix)
        cluster.wait_healthy()
        cluster.check_copies()


def test_replica_stopped_beyond_the_deadline(context):
    """A replica that does not answer for 3 s is removed; it comes back as a joiner."""
    with context.cluster() as cluster:
        cluster.up()
        history = History(LOADED)
        load = Workload(history, cluster.engine.unix, context.seed).start()
        load.wait_completed(1000)
        silent = cluster.replicas[2]
        load.reset_gap()
        silent.process.signal(signal.SIGSTOP)
        wait_for(lambda: len(cluster.record().in_sync) == 2, "the silent replica's removal")
        load.wait_completed(1000)
        gap = load.longest_gap
        assert 1.0 < gap < 6.0, f"the pause was {gap:.1f} s, the deadline is 3 s"
        silent.process.signal(signal.SIGCONT)
        cluster.engine.wait_state(silent, "inSync")
        error = load.stop()
        assert error is None, f"the client got an error: {error}"
        check_all(history, cluster.engine.unix)
        cluster.check_copies()
        return f"pause {gap:.2f} s"


def test_last_replicas_lost_and_back(context):
    """With no member left the volume holds its requests, and goes on when they return."""
    with context.cluster() as cluster:
        cluster.up()
        history = History(LOADED)
        load = Workload(history, cluster.engine.unix, context.seed).start()
        load.wait_completed(1000)
        for replica in cluster.replicas:
            replica.process.signal(signal.SIGKILL)
        for replica in cluster.replicas:
            replica.process.wait()
        wait_for(lambda: cluster.engine.status()["state"] == "stalled", "the volume to stall")
        before = load.completed
        cluster.start_replicas()
        cluster.engine.wait_serving()
        load.wait_completed(1000)
        error = load.stop()
        assert error is None, f"the client got an error: {error}"
        check_all(history, cluster.engine.unix)
        cluster.wait_healthy()
        cluster.check_copies()
        return f"{before} requests before, {load.completed - before} after"
