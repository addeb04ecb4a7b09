"""Settings that decide what happens while replicas are missing: --io-timeout, --min-in-sync,
--stale-replica-timeout."""

import errno
import os
import pathlib
import signal
import time

from harness.cluster import MIB, wait_for
from harness.plane import Plane
from harness.workload import BLOCK, History, Workload, check_all, connect, content

LOADED = 64 * MIB // BLOCK
TIMEOUT = 1.5
NEVER_WRITTEN = 100  # a block


def silence(cluster):
    for replica in cluster.replicas:
        replica.process.signal(signal.SIGSTOP)


def end_silence(cluster):
    for replica in cluster.replicas:
        replica.process.signal(signal.SIGCONT)


def kill_replicas(cluster):
    for replica in cluster.replicas:
        replica.process.kill()


class Requests:
    """One of each kind, sent at once; `answers`: error and seconds of each."""

    def __init__(self, handle, version):
        self.handle, self.answers, self.start = handle, {}, time.monotonic()
        self.buffer, self.data = memoryview(bytearray(BLOCK)), content(0, version)
        handle.aio_pwrite(self.data, 0, self._done("write"))
        handle.aio_trim(BLOCK, NEVER_WRITTEN * BLOCK, self._done("trim"))
        handle.aio_flush(self._done("flush"))

    def _done(self, name):
        def done(error):
            number = error.value if hasattr(error, "value") else error
            self.answers[name] = number, time.monotonic() - self.start
            return 1
        return done

    def wait(self):
        def is_over():
            self.handle.poll(10)
            return len(self.answers) == 3
        wait_for(is_over, f"more answers than {self.answers}", 20)
        return self.answers


def check_time_out(cluster, handle, away, back, version):
    """Every request ends with an error after the time-out, and none before; then all is well on
    the same connection. The longest it took."""
    away(cluster)
    answers = Requests(handle, version).wait()
    assert all(error == errno.EIO for error, _ in answers.values()), answers
    times = [seconds for _, seconds in answers.values()]
    assert TIMEOUT <= min(times) and max(times) < TIMEOUT + 1, answers
    back(cluster)
    cluster.engine.wait_serving()
    cluster.wait_healthy()
    # The write that was answered with an error may have been done.
    assert handle.pread(BLOCK, 0) in (content(0, version - 1), content(0, version))
    answers = Requests(handle, version + 1).wait()
    assert not any(error for error, _ in answers.values()), answers
    assert handle.pread(BLOCK, 0) == content(0, version + 1)
    return max(times)


def test_requests_time_out(context):
    """With --io-timeout a client gets an error when no replica answers, stopped or dead, for that
    long, and the volume goes on afterwards; all copies are equal, also where an error was."""
    with context.cluster() as cluster:
        cluster.engine_options = ["--io-timeout", int(TIMEOUT * 1000)]
        cluster.up()
        handle = connect(cluster.engine.unix)
        handle.pwrite(content(0, 1), 0)
        longest = max(
            check_time_out(cluster, handle, silence, end_silence, 2),
            check_time_out(cluster, handle, kill_replicas, lambda c: c.start_replicas(), 4))
        handle.shutdown()
        cluster.check_copies()
        return f"errors after {TIMEOUT} to {longest:.2f} s"


def lose(cluster, replica, left):
    replica.process.kill()
    wait_for(lambda: len(cluster.record().in_sync) == left, "its removal")


def test_writes_wait_for_enough_members(context):
    """With --min-in-sync 2 of three: one loss costs nothing, the second holds the writes, and no
    others, until one is back."""
    with context.cluster() as cluster:
        cluster.engine_options = ["--min-in-sync", 2]
        cluster.up()
        assert cluster.record().min_in_sync == 2
        first, second, _ = cluster.replicas
        history = History(LOADED)
        load = Workload(history, cluster.engine.unix, context.seed, writes_only=True).start()
        load.wait_completed(500)
        lose(cluster, first, 2)
        load.wait_completed(500)
        # Stopped first: what both had acknowledged has arrived when every write waits.
        second.process.signal(signal.SIGSTOP)
        wait_for(lambda: load.silence > 1.5, "every write to wait")
        held = load.completed
        lose(cluster, second, 1)
        reader = connect(cluster.engine.unix)
        for _ in range(1000):
            reader.pread(BLOCK, (LOADED + 1) * BLOCK)
        reader.shutdown()
        assert load.completed == held, f"{load.completed - held} writes acknowledged by one member"
        start = time.monotonic()
        first.start()
        load.wait_completed(500)
        waited = time.monotonic() - start
        assert len(cluster.record().in_sync) >= 2
        second.start()
        cluster.wait_healthy()
        error = load.stop()
        assert error is None, f"the client got an error: {error}"
        check_all(history, cluster.engine.unix)
        cluster.check_copies()
        return f"500 writes {waited:.1f} s after one was started again"


def test_replica_that_stays_away_is_replaced(context):
    """A node dies with its replica; after --stale-replica-timeout there is another on the fourth
    node, and when the dead one returns its copy goes."""
    with Plane(context, nodes=4) as plane:
        plane.run("volume", "create", "vol", "--size", str(64 * MIB),
                  "--stale-replica-timeout", "2s")
        before = plane.replicas()
        (spare,) = {f"node-{number}" for number in (1, 2, 3, 4)} - set(before)
        dead, home = sorted(before)[:2]
        plane.run("volume", "attach", "vol", "--node", home)
        path = plane.image(16 * MIB)
        plane.write(path)
        plane.until("all replicas", lambda v: v["robustness"] == "healthy")
        lost = plane.replicas()[dead]
        start = time.monotonic()
        plane.kill(plane.daemon(dead))
        os.kill(lost["pid"], signal.SIGKILL)
        plane.until("another replica", lambda v: v["robustness"] == "healthy" and lost["id"] not in
                    [replica["id"] for replica in v["replicas"]])
        replaced = time.monotonic() - start
        assert set(plane.replicas()) == set(before) - {dead} | {spare}, plane.replicas()
        assert replaced > 2, replaced
        kinds = [event["kind"] for event in plane.run("events", "--limit", "100")]
        assert kinds.count("ReplicaReplacementStarted") == kinds.count("ReplicaReplaced") == 1
        assert plane.read()[:16 * MIB] == path.read_bytes()
        assert pathlib.Path(lost["directory"]).exists()
        plane.up()
        wait_for(lambda: not pathlib.Path(lost["directory"]).exists(), "the old copy to go")
        return f"replaced after {replaced:.1f} s"


def is_made_anew(plane, lost):
    """On its own node, and nothing of the old one stays."""
    plane.until("another replica", lambda v: v["robustness"] == "healthy" and lost["id"] not in
                [replica["id"] for replica in v["replicas"]])
    assert plane.replicas().keys() == {"node-1", "node-2", "node-3"}, plane.replicas()
    wait_for(lambda: not pathlib.Path(lost["directory"]).exists(), "the old copy to go")


def test_damaged_copy_is_made_anew_where_it_is(context):
    """Every node has a replica, and one's files are cut short: it cannot start any more, says why,
    and after --stale-replica-timeout there is another on its node."""
    with Plane(context, nodes=3) as plane:
        plane.run("volume", "create", "vol", "--size", str(64 * MIB),
                  "--stale-replica-timeout", "2s")
        home, node = sorted(plane.replicas())[:2]
        plane.run("volume", "attach", "vol", "--node", home)
        path = plane.image(16 * MIB)
        plane.write(path)
        plane.until("all replicas", lambda v: v["robustness"] == "healthy")
        lost = plane.replicas()[node]
        (table, *_) = pathlib.Path(lost["directory"], "layers").glob("*.table")
        os.truncate(table, 4096)
        os.kill(lost["pid"], signal.SIGKILL)
        reasons = []

        def says_why(volume):
            reasons.append(volume["reason"] or "")
            return "4096 bytes instead of" in reasons[-1]

        plane.until("the reason", says_why)
        assert f"replica {lost['id']} of volume vol" in reasons[-1], reasons[-1]
        is_made_anew(plane, lost)
        assert plane.read()[:16 * MIB] == path.read_bytes()
        return reasons[-1]


def test_copy_with_a_damaged_table_page_is_made_anew(context):
    """Both slots of a page rot in a replica that runs, and the region is written: the replica ends,
    does not start again beside the others, and after --stale-replica-timeout there is another."""
    with Plane(context, nodes=3) as plane:
        # Longer than a node agent waits before it starts a process again.
        plane.run("volume", "create", "vol", "--size", str(64 * MIB),
                  "--stale-replica-timeout", "10s")
        home, node = sorted(plane.replicas())[:2]
        plane.run("volume", "attach", "vol", "--node", home)
        path = plane.image(16 * MIB)
        plane.write(path)
        plane.until("all replicas", lambda v: v["robustness"] == "healthy")
        lost = plane.replicas()[node]
        # With nothing to compare and told to end, it writes its pages back; the next process has
        # none of them in memory.
        plane.run("volume", "detach", "vol")
        os.kill(lost["pid"], signal.SIGTERM)
        wait_for(lambda: plane.replicas()[node].get("pid") not in (None, 0, lost["pid"]),
                 "the next process")
        plane.run("volume", "attach", "vol", "--node", home)
        plane.until("all replicas", lambda v: v["robustness"] == "healthy")
        (table,) = pathlib.Path(lost["directory"], "layers").glob("*.table")
        region = 7
        with open(table, "r+b") as file:
            file.seek(region * 8192)
            assert any(file.read(8192)), "the page was never written"
            file.seek(region * 8192)
            file.write(plane.random.randbytes(8192))
            os.fsync(file.fileno())
        part = plane.directory / "part"
        part.write_bytes(plane.random.randbytes(64 << 10))
        plane.write(part, region * MIB)
        reasons = []

        def says_why(volume):
            reasons.append(volume["reason"] or "")
            return f"the table page of region {region} is damaged" in reasons[-1]

        plane.until("the reason", says_why)
        assert f"replica {lost['id']} of volume vol" in reasons[-1], reasons[-1]
        is_made_anew(plane, lost)
        expected = bytearray(path.read_bytes())
        expected[region * MIB:region * MIB + (64 << 10)] = part.read_bytes()
        assert plane.read()[:16 * MIB] == bytes(expected)
        # It was not served again: it would have been filled until the page is needed.
        (log,) = plane.cluster.glob(f"{node}/**/r-{lost['id']}.log")
        said = log.read_text()
        assert said.count(" info serving ") == 2, said
        assert (f"haptera-replica: replica {lost['id']} of volume vol: the table page of region "
                f"{region} is damaged") in said, said
        return reasons[-1]
