"""Snapshots of several volumes at one instant: no effect without its cause, all of them or none."""

import os
import signal
import statistics
import threading
import time

import nbd

from harness.cluster import MIB, ControlError, control, wait_for
from harness.context import once
from harness.plane import Plane
from harness.workload import BLOCK, SyncProbe

SIZE = 16 * MIB


class Chain(threading.Thread):
    """A client of several volumes: each of its writes is caused by the one before, on another."""

    def __init__(self, uris):
        super().__init__(daemon=True)
        self.handles = []
        for uri in uris:
            handle = nbd.NBD()
            handle.connect_uri(uri)
            self.handles.append(handle)
        self.count, self.longest, self.failure, self.ends = 0, 0.0, None, False

    def run(self):
        try:
            while not self.ends:
                number = self.count
                begun = time.monotonic()
                block = number // len(self.handles) % (SIZE // BLOCK)
                self.handles[number % len(self.handles)].pwrite(
                    (number + 1).to_bytes(8, "little") * (BLOCK // 8), block * BLOCK)
                self.count += 1
                self.longest = max(self.longest, time.monotonic() - begun)
        except nbd.Error as error:
            self.failure = error

    def stop(self):
        self.ends = True
        self.join()
        for handle in self.handles:
            handle.shutdown()
        assert self.failure is None, self.failure


def cut(uris):
    """How many of the chain's writes the snapshots at these places hold, of each volume."""
    counts = []
    for uri in uris:
        handle = nbd.NBD()
        handle.connect_uri(uri)
        latest = 0
        for offset in range(0, SIZE, MIB):
            data = handle.pread(MIB, offset)
            latest = max([latest, *(int.from_bytes(data[at:at + 8], "little")
                                    for at in range(0, MIB, BLOCK))])
        counts.append(latest)
        handle.shutdown()
    return counts


def check_cut(counts):
    """The numbers of the last writes that the volumes hold are the last ones of one chain."""
    last = max(counts)
    expected = sorted(range(last - len(counts) + 1, last + 1))
    assert sorted(counts) == expected, f"the volumes hold the chain up to {counts}"
    return last


@once
def test_group_snapshots_are_one_cut(context):
    """Twenty groups of three volumes under a client that writes to one when another has answered;
    a group that fails half-way leaves nothing; a name of one volume's is refused."""
    names = ("a", "b", "c")
    with Plane(context) as plane, SyncProbe(plane.directory) as probe:
        for name in names:
            plane.run("volume", "create", name, "--size", str(SIZE))
            plane.run("volume", "attach", name)
        uris = [plane.run("volume", "show", name)["engine"]["unixURI"] for name in names]
        chain = Chain(uris)
        chain.start()
        pauses, others = [], []
        for turn in range(20):
            wait_for(lambda: chain.count > 50 * turn, "the client to get on")
            chain.longest = 0.0
            # As many as there are while a group is taken, and more.
            alone = chain.count
            wait_for(lambda: chain.count > alone + 200, "the client to write")  # pylint: disable=W0640
            others.append(chain.longest)
            chain.longest = 0.0
            taken = plane.run("snapshot", "create", "--group", "a,b,c", f"g{turn}",
                              "--label", "app=db")
            wait_for(lambda: chain.count > 50 * turn + 20, "the client to go on")
            pauses.append(chain.longest)
            assert [s["volume"] for s in taken] == list(names), taken
            assert taken[0]["labels"]["app"] == "db" and taken[0]["labels"]["haptera.io/group"]
        p99 = probe.p99()
        # Without a hold they are none: the check would notice.
        for name in names:
            plane.run("snapshot", "create", name, "apart")
        # Again: they are there.
        again = plane.run("snapshot", "create", "--group", "a,b,c", "g3")
        assert [s["layer"] for s in again] == [
            s["layer"] for name in names
            for s in plane.run("snapshot", "list", name) if s["name"] == "g3"]
        plane.run("snapshot", "create", "b", "mine")
        text = plane.run("snapshot", "create", "--group", "a,b,c", "mine", fails=True)
        assert "choose another name" in text, text
        # One that is not attached belongs to a group as well, and stays so.
        chain.stop()
        plane.run("volume", "detach", "c")
        mixed = plane.run("snapshot", "create", "--group", "a,b,c", "mixed")
        assert [s["volume"] for s in mixed] == list(names) and mixed[2]["uri"] is None, mixed
        assert plane.run("volume", "show", "c")["state"] == "detached"
        # One that cannot be held: nobody has the snapshot.
        engine = plane.run("volume", "show", "b")["engine"]["pid"]
        os.kill(engine, signal.SIGSTOP)
        plane.run("snapshot", "create", "--group", "a,b,c", "half", fails=True)
        os.kill(engine, signal.SIGCONT)

        def held(name):
            return [s["name"] for s in plane.run("snapshot", "list", name)]

        # The engine that was stopped may have taken it late: it is deleted when it can be asked.
        wait_for(lambda: not any("half" in held(name) for name in names), "all to be undone", 90)
        for name in names:
            assert len(held(name)) == 22 + (name == "b"), held(name)
        plane.run("volume", "attach", "c")
        lasts = []
        for turn in range(20):
            shown = [plane.run("snapshot", "show", name, f"g{turn}") for name in names]
            lasts.append(check_cut(cut([s["unixURI"] for s in shown])))
        assert lasts == sorted(lasts) and lasts[0] > 0, lasts
        shown = [plane.run("snapshot", "show", name, "apart") for name in names]
        try:
            check_cut(cut([s["unixURI"] for s in shown]))
            raise RuntimeError("snapshots taken one after the other pass for a cut")
        except AssertionError:
            pass
        # What it takes on a busy machine (docs/benchmarks.md), and as much again; on a slow disk
        # what its syncs take.
        limit = max(0.15, 5 * p99)
        assert statistics.median(pauses) < limit, (limit, pauses, others)
        return (f"20 groups, each one cut of {chain.count} writes; longest pause of each: median "
                f"{statistics.median(pauses) * 1e3:.0f}, longest {max(pauses) * 1e3:.0f} ms; in "
                f"200 writes without one: median {statistics.median(others) * 1e3:.0f} ms")


def test_a_hold_ends_by_itself(context):
    """Whoever asked for it may be gone."""
    with context.cluster(size=SIZE) as cluster:
        cluster.up()
        handle = nbd.NBD()
        handle.set_export_name("volume")
        handle.connect_unix(str(cluster.engine.unix))
        handle.pwrite(b"a" * BLOCK, 0)
        engine = cluster.engine.control
        # It counts from the request on. Long, so that this machine may take its time meanwhile.
        hold, begun = 4.0, time.monotonic()
        control(engine, "snapshot", name="first", created=1, hold=5, **{"for": int(hold * 1000)})
        assert handle.pread(BLOCK, 0) == b"a" * BLOCK
        assert time.monotonic() - begun < hold / 2, "reads wait for the end of the hold"
        try:
            control(engine, "snapshot", name="other", created=1, hold=6, **{"for": 700})
            raise RuntimeError("two holds at once")
        except ControlError as error:
            assert "another snapshot of a group" in str(error), error
        handle.pwrite(b"b" * BLOCK, 0)
        waited = time.monotonic() - begun
        # (The engine may have looked at its clock a moment before.)
        assert hold - 0.1 < waited < hold + 4, f"the write was answered after {waited:.2f} s"
        assert control(engine, "release", token=5)["held"] == "0"
        # Released in time: the write is answered at once.
        frozen = time.monotonic()
        control(engine, "snapshot", name="second", created=1, hold=7, **{"for": 10000})
        answered = threading.Event()
        writer = threading.Thread(
            target=lambda: (handle.pwrite(b"c" * BLOCK, 0), answered.set()), daemon=True)
        writer.start()
        assert not answered.wait(0.3), "acknowledged behind the freeze, before the release"
        assert control(engine, "release", token=7)["held"] == "1"
        assert answered.wait(60), "not answered after the release"
        assert time.monotonic() - frozen < 8, "answered at the end of the hold only"
        writer.join()
        for name, expected in (("first", b"a"), ("second", b"b")):
            assert control(engine, "snapshot", name=name, created=1)["existed"] == "1"
            reader = nbd.NBD()
            reader.set_export_name(f"volume@{name}")
            reader.connect_unix(str(cluster.engine.unix))
            assert reader.pread(BLOCK, 0) == expected * BLOCK, name
            reader.shutdown()
        handle.shutdown()
        cluster.check_copies()
        return f"held for {waited:.2f} of {hold:.0f} s"
