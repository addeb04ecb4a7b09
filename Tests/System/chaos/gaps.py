"""How long a client waits when something dies: each measurement on a volume of its own."""

import contextlib
import os
import signal
import time

from harness.cluster import MIB, wait_for
from harness.plane import Plane
from harness.workload import BLOCK, History, SyncProbe, Workload, check_all

from .checker import Checker
from .data import CELL
from .workers import Worker

BLOCKS = 64 * MIB // BLOCK
DEPTH = 32
REMOVAL_DEADLINE = 3.0
FLOOR = 0.05


class Gap:
    """A measured pause and what it may be, seconds.

    `stall`: the longest of a process that did nothing but sync in the same seconds.
    """

    STALL_MAX = 0.5

    def __init__(self, seconds, limit, remark, stall=0.0):
        self.seconds, self.limit, self.remark, self.stall = seconds, limit, remark, stall

    @property
    def is_met(self):
        return self.seconds < self.limit

    @property
    def is_met_when_busy(self):
        """The same where others may use the machine and its disk: what they cost is not ours."""
        # (Of stalls that long it is not the machine's doing alone.)
        return self.seconds < self.limit + 2 * min(self.stall, self.STALL_MAX)

    def __str__(self):
        return (f"{self.seconds * 1e3:.1f} ms, limit {self.limit * 1e3:.0f} ms ({self.remark}), "
                f"longest stall {self.stall * 1e3:.0f} ms")


@contextlib.contextmanager
def loaded(context):
    with context.cluster() as cluster, SyncProbe(cluster.path) as probe:
        cluster.up()
        history = History(BLOCKS)
        load = Workload(history, cluster.engine.unix, context.seed, depth=DEPTH).start()
        load.wait_completed(3000)
        load.reset_gap()
        probe.reset_stall()
        yield cluster, load, probe
        error = load.stop()
        assert error is None, f"the client got an error: {error}"
        check_all(history, cluster.engine.unix)


def by_disk(seconds, probe, remark=""):
    p99 = probe.p99()
    return Gap(seconds, max(FLOOR, 5 * p99), f"{remark}fdatasync p99 {p99 * 1e3:.1f} ms",
               probe.longest_stall)


def replica_killed(context):
    with loaded(context) as (cluster, load, probe):
        lost = cluster.replicas[1]
        lost.process.kill()
        cluster.engine.wait_state(lost, "absent")
        load.wait_completed(3000)
        return by_disk(load.longest_gap, probe)


def replica_stopped(context):
    with loaded(context) as (cluster, load, probe):
        silent = cluster.replicas[2]
        silent.process.signal(signal.SIGSTOP)
        wait_for(lambda: len(cluster.record().in_sync) == 2, "the silent replica's removal")
        load.wait_completed(3000)
        silent.process.signal(signal.SIGCONT)
        return Gap(load.longest_gap, REMOVAL_DEADLINE + 0.1, "the removal deadline and 100 ms",
                   probe.longest_stall)


def store_away(context, seconds):
    with loaded(context) as (cluster, load, probe):
        epoch = cluster.record().epoch
        cluster.store.stop()
        load.reset_gap()
        probe.reset_stall()
        begin = time.monotonic()
        while time.monotonic() < begin + seconds:
            load.wait_completed(100)
        at = load.longest_gap_at
        # Nothing happens that could make a client wait, so what it waited for is the disk and the
        # machine; over a whole outage their longest stall counts, which a p99 does not know.
        remark = (f"{seconds:.0f} s, {load.completed} requests, the gap after {at - begin:.0f} s, "
                  f"stall beside it {probe.stall_near(at) * 1e3:.0f} ms, ")
        gap = by_disk(load.longest_gap, probe, remark)
        gap.limit = max(gap.limit, 2 * gap.stall)
        cluster.store.start()
        assert cluster.record().epoch == epoch, "something changed the record"
        return gap


def engine_killed(context):
    """Under a client that reconnects, with the engine started again at once."""
    with context.cluster() as cluster, SyncProbe(cluster.path) as probe:
        cluster.up()
        cluster.engine.status()
        checker = Checker()
        client = Worker(checker, 0, cluster.engine.unix, BLOCKS * BLOCK // CELL, context.seed,
                        depth=DEPTH).start()
        wait_for(lambda: client.completed > 3000, "the load")
        client.longest_gap = 0.0
        probe.reset_stall()
        before, answered = cluster.engine, client.completed
        before.process.kill()
        cluster.start_engine(wait=False, before=before)
        wait_for(lambda: client.completed > answered + 500, "answers from the next engine")
        gap, stall, status = client.longest_gap, probe.longest_stall, {}
        wait_for(lambda: status.update(cluster.engine.status()) or
                 int(status.get("unresolvedRegions", 0)) == 0, "the resolution's end")
        assert client.reconnects == 1, client.state
        moved, at_most = int(status["lastTakeover.blocks"]), 2 * client.retried_blocks
        # Only what was on the way can differ, on two of the three at most.
        assert moved <= at_most, f"{moved} blocks moved, at most {at_most} can have differed"
        remark = (f"{status['lastTakeover.regions']} regions, {moved} blocks moved of at most "
                  f"{at_most}, {status['lastTakeover.milliseconds']} ms")
        client.stop()
        cluster.wait_healthy()
        cluster.check_copies()
        return Gap(gap, 1.0, remark, stall)


def engine_restarted(context):
    """The same, started again by its node agent, which first has to notice."""
    with Plane(context, "volume") as plane, SyncProbe(plane.directory) as probe:
        plane.run("volume", "create", "volume", "--size", str(BLOCKS * BLOCK))
        plane.run("volume", "attach", "volume")
        engine = plane.until(
            "all replicas", lambda v: v["robustness"] == "healthy" and v["engine"])
        path = engine["unixURI"].partition("socket=")[2]
        checker = Checker()
        client = Worker(checker, 0, path, BLOCKS * BLOCK // CELL, context.seed, depth=DEPTH).start()
        wait_for(lambda: client.completed > 3000, "the load")
        client.longest_gap, answered = 0.0, client.completed
        probe.reset_stall()
        os.kill(engine["pid"], signal.SIGKILL)
        wait_for(lambda: client.completed > answered + 500, "answers from the next engine")
        gap, stall = client.longest_gap, probe.longest_stall
        client.stop()
        plane.until("the next engine", lambda v: v["engine"]["pid"] not in (None, engine["pid"]))
        return Gap(gap, 1.0, f"{client.retries} requests repeated", stall)
