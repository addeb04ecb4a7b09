"""A replica that answers, much later than the others."""

import time

from harness.cluster import MIB
from harness.disks import SmallFileSystem, WriteLimit
from harness.workload import BLOCK, History, Workload, check_all, connect

SIZE = 64 * MIB
LOADED = 16 * MIB
SLOW = 6  # why it left: VolumeRecord.DepartureReason
WRITES_PER_SECOND = 40


class TimedWrites(Workload):
    """Keeps how long each write took, seconds."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.taken = []

    def _write_done(self, span, version, data=None, flags=0):
        done, start = super()._write_done(span, version, data, flags), time.monotonic()

        def timed(error):
            self.taken.append(time.monotonic() - start)
            return done(error)
        return timed

    def measure(self, until):
        """Median and longest of the writes answered while `until()` is waited for."""
        self.taken = []
        until()
        taken = sorted(self.taken)
        return taken[len(taken) // 2], taken[-1]


def fill(cluster):
    """Writes all of the volume, so that it holds much more than the load changes."""
    handle = connect(cluster.engine.unix)
    for offset in range(0, SIZE, MIB):
        handle.pwrite(offset.to_bytes(8, "little") * (MIB // 8), offset)
    handle.trim(LOADED, 0)  # the load's part begins as zeros
    handle.flush()
    handle.shutdown()


def departures(cluster, replica):
    return [reason for who, _, _, _, _, _, reason, _ in cluster.record().out if who == replica.id]


def test_slow_replica_leaves_and_returns(context):
    """One disk of three takes a few writes a second: its replica answers everything, and the
    clients are as slow as it is, until it leaves by choice. When the disk is quick again the
    replica, the same process, is filled with what changed."""
    with context.cluster(size=SIZE) as cluster, \
            SmallFileSystem(cluster.path, 256 * MIB) as small, WriteLimit(small) as limit:
        slow = cluster.replicas[1]
        slow.directory = small / "replica"
        cluster.up()
        process = slow.process
        limit.hold(process)
        fill(cluster)
        history = History(LOADED // BLOCK)
        load = TimedWrites(history, cluster.engine.unix, context.seed, depth=8,
                           writes_only=True).start()
        load.wait_completed(500)
        before, _ = load.measure(lambda: load.wait_completed(1500))

        start = time.monotonic()
        limit.set(WRITES_PER_SECOND)
        meanwhile, longest = load.measure(
            lambda: cluster.engine.wait_state(slow, "absent", 60))
        left_after = time.monotonic() - start
        assert departures(cluster, slow) == [SLOW], cluster.record()
        assert process.is_running and len(cluster.record().in_sync) == 2
        load.wait_completed(100)
        after, _ = load.measure(lambda: load.wait_completed(1500))
        text = (f"median of the writes {before * 1e3:.1f} ms, {meanwhile * 1e3:.0f} ms beside the "
                f"slow disk (longest {longest * 1e3:.0f} ms), {after * 1e3:.1f} ms after it left")
        assert meanwhile > 0.1, f"the disk was not slow: {text}"
        assert after < max(2 * before, meanwhile / 4), text

        sent = int(cluster.engine.metrics()["haptera_engine_rebuilt_bytes_total"])
        limit.lift()
        cluster.engine.wait_state(slow, "inSync", 60)
        back_after = time.monotonic() - start
        sent = int(cluster.engine.metrics()["haptera_engine_rebuilt_bytes_total"]) - sent
        assert 0 < sent < SIZE // 2, f"{sent} bytes sent, {LOADED} can have changed"
        assert "sinceEpoch=0" not in cluster.engine.process.log.read_text(), "compared in full"
        assert slow.process is process and process.is_running
        error = load.stop()
        assert error is None, f"the client got an error: {error}"
        check_all(history, cluster.engine.unix)
        cluster.check_copies()
        return (f"{text}; left after {left_after:.1f} s, back after {back_after:.1f} s, "
                f"{sent / MIB:.1f} MiB sent")
