"""Processes that are told to end (SIGTERM) under load: one, all of them at one instant, or those of
one host in order."""

import os
import signal
import subprocess
import time

from chaos.checker import Checker
from chaos.data import CELL
from chaos.gaps import by_disk
from chaos.workers import CONNECTION_ERRORS, Worker
from harness.cluster import CONTROL_BINARIES, MIB, control, wait_for
from harness.context import once
from harness.plane import Plane, alive
from harness.workload import BLOCK, History, SyncProbe, Workload, check_all, connect

from test_crashes import lose_one_under_load
from test_gaps import in_time

LOADED = 64 * MIB // BLOCK
LEASE = 6  # long, so that who waits for it is told from who does not, on a busy machine too


def end(*processes):
    """SIGTERM to all, then how long until the last has ended, seconds; each in order."""
    start = time.monotonic()
    for process in processes:
        process.signal(signal.SIGTERM)
    statuses = [process.wait(30) for process in processes]
    assert not any(statuses), f"exit {statuses}"
    return time.monotonic() - start


def lose_engine(load):
    """The client's connection ends, without another error."""
    error = load.join()
    assert error is not None and error.errnum in CONNECTION_ERRORS, error


def serve_again(cluster, generation):
    """Seconds from the start of the next engine to its first answer to a client."""
    start = time.monotonic()
    cluster.start_engine(client_generation=generation)
    connect(cluster.engine.unix).pread(BLOCK, 0)
    return time.monotonic() - start


def test_engine_ended_under_load(context):
    """It answers what it has begun and leaves in order: the next one compares nothing and waits
    for no lease, as it must for those of one that was killed."""
    with context.cluster() as cluster:
        cluster.engine_options = [
            "--lease", LEASE * 1000, "--removal-deadline", LEASE * 1000]
        cluster.up()
        history, cut = History(LOADED), 0
        ended, served = [], []
        for turn in range(3):
            load = Workload(history, cluster.engine.unix, context.seed + turn).start()
            load.wait_completed(1000)
            ended.append(end(cluster.engine.process))
            lose_engine(load)
            cut += sum(map(bool, history.doubtful))
            record = cluster.record()
            assert record.clean and not record.engine and len(record.in_sync) == 3, record
            served.append(serve_again(cluster, turn + 2))
            status = cluster.engine.status()
            assert status["lastTakeover.regions"] == "0", status
            check_all(history, cluster.engine.unix)
        assert cut > 0, "no write was on the way"
        cluster.engine.process.kill()
        assert not cluster.record().clean
        killed = serve_again(cluster, 5)
        text = (f"ended after {max(ended) * 1e3:.0f} ms at most, {cut} blocks unanswered; the next "
                f"one answered after {max(served):.2f} s at most, after a kill {killed:.2f} s")
        assert max(served) < 0.6 * LEASE < killed, text
        cluster.wait_healthy()
        check_all(history, cluster.engine.unix)
        cluster.check_copies()
        return text


def test_everything_ended_under_load(context):
    """As when the host of a whole cluster is shut down, whoever hears of it first. The engine may
    find no replica to leave in order with, but what it answered is there, and no copy is made
    anew or compared in full."""
    with context.cluster() as cluster:
        cluster.up()
        history, ended, clean = History(LOADED), [], 0
        for turn in range(3):
            load = Workload(history, cluster.engine.unix, context.seed + turn).start()
            load.wait_completed(1000)
            processes = cluster.processes()
            ended.append(end(*(processes if turn % 2 else processes[::-1])))
            lose_engine(load)
            is_clean = cluster.record().clean
            clean += is_clean
            log = cluster.engine.process.log.read_text()
            assert ("volume detached" in log) == is_clean, log[-1000:]
            assert ("left without marking the volume clean" in log) != is_clean, log[-1000:]
            cluster.start_replicas()
            cluster.start_engine(client_generation=turn + 2)
            check_all(history, cluster.engine.unix)
            cluster.wait_healthy()
            assert "sinceEpoch=0" not in cluster.engine.process.log.read_text(), turn
        cluster.check_copies()
        return (f"{len(ended)} times, ended after {max(ended):.1f} s at most, {clean} times with "
                "a clean record")


def test_replica_ended_under_load(context):
    return in_time(lose_one_under_load, context, end)


def shut_down(plane, node):
    """As docs/operations.md has it for a host that goes down."""
    agent = plane.daemon(node)
    os.kill(agent, signal.SIGTERM)
    wait_for(lambda: not alive(agent), "the node agent's end")
    subprocess.run(
        [CONTROL_BINARIES / "haptera-node", "shutdown", "--dir", plane.cluster / node],
        check=True, capture_output=True, timeout=60)


def end_at_once(plane, node):
    """As by a service manager that ends all there is of a service."""
    agent, units = plane.daemon(node), plane.pids(plane.cluster / node)
    for pid in {agent, *units}:
        os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not any(map(alive, [agent, *units])), "their end")


@once
def test_node_shut_down(context):
    return in_time(take_down, context, shut_down)


@once
def test_node_ended_at_once(context):
    return in_time(take_down, context, end_at_once)


def take_down(context, end_node):
    """A host goes down under load. Its engine leaves a clean record, so that the next one waits for
    nothing and compares nothing; other volumes go on without its replicas at once, and when it is
    back everything is as before by itself, with no copy made anew. What the others' clients waited,
    which must not be long."""
    with Plane(context, "volume") as plane, SyncProbe(plane.directory) as probe:
        def show(name):
            return plane.run("volume", "show", name)

        def wait_healthy(name):
            return wait_for(lambda: (v := show(name))["robustness"] == "healthy" and v["engine"]
                            and v, f"all replicas of {name}")
        for name, node in (("volume", "node-1"), ("other", "node-2")):
            plane.run("volume", "create", name, "--size", str(LOADED * BLOCK))
            plane.run("volume", "attach", name, "--node", node)
        here, other = wait_healthy("volume"), wait_healthy("other")
        assert (here["engine"]["node"], other["engine"]["node"]) == ("node-1", "node-2")
        client = Worker(Checker(), 0, here["engine"]["unixURI"].partition("socket=")[2],
                        LOADED * BLOCK // CELL, context.seed).start()
        history = History(LOADED)
        load = Workload(history, other["engine"]["uri"], context.seed).start()
        load.wait_completed(1000)
        wait_for(lambda: client.completed > 1000, "the load")

        load.reset_gap()
        probe.reset_stall()
        end_node(plane, "node-1")
        assert not [pid for pid in plane.pids(plane.cluster / "node-1") if alive(pid)]
        load.wait_completed(1000)
        gap = by_disk(load.longest_gap, probe, "clients of another host's engine, ")
        wait_for(lambda: not next(r for r in show("other")["replicas"]
                                  if r["node"] == "node-1")["inSync"], "the replica's removal")

        answered = client.completed
        plane.up()
        wait_for(lambda: client.completed > answered + 500, "answers from the next engine")
        for name, node, at_most in (("volume", "node-1", "0"), ("other", "node-2", None)):
            unit = plane.cluster / node / "run" / f"e-{wait_healthy(name)['id'][:16]}"
            status = control(unit.with_suffix(".sock"), "status")
            assert at_most in (None, status["lastTakeover.regions"]), status
            assert "sinceEpoch=0" not in unit.with_suffix(".log").read_text(), name
        client.stop()
        error = load.stop()
        assert error is None, error
        check_all(history, other["engine"]["uri"])
        return gap
