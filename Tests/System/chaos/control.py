"""A volume on a real control plane, and what is done to controller, node agents and, meanwhile, to
the engine and replicas. Nobody here starts an engine or a replica again: that is the agents' work.

Each fault waits for what it is about to be seen, ends, and needs the plane as it was before.
"""

import contextlib
import functools
import os
import random
import signal
import time

from harness.cluster import MIB, ControlError, Copy, control, wait_for

from .checker import Checker
from .copies import compare
from .data import CELL
from .workers import Worker

HELD = 1.2  # seconds without any answer; a removal or a takeover takes less
CONVERGENCE = 90.0


class Attached:
    """Three replicas on three nodes, an engine on one of them, two clients and their judge.

    `plane` must call the volume "volume", as the clients do.
    """

    def __init__(self, plane, seed, size=32 * MIB):
        self.plane, self.random, self.size = plane, random.Random(seed), size
        self.plan, self.began = [f"seed {seed}"], time.monotonic()
        plane.run("volume", "create", plane.name, "--size", str(size))
        plane.run("volume", "attach", plane.name)
        shown = plane.until(
            "all replicas", lambda v: v["robustness"] == "healthy" and v["engine"] and v)
        self.nodes = [replica["node"] for replica in shown["replicas"]]
        self.ids = {replica["node"]: replica["id"] for replica in shown["replicas"]}
        self.home = shown["engine"]["node"]
        self.engine = f"{self.home}/run/e-{shown['id'][:16]}"
        self.victims = self.random.sample(self.nodes, len(self.nodes))
        self.checker = Checker()
        host, _, port = shown["engine"]["uri"].split("/")[2].rpartition(":")
        places = [plane.cluster / f"{self.engine}.nbd", (host, int(port))]
        self.workers = [
            Worker(self.checker, number, place, size // CELL, self.random.getrandbits(32))
            for number, place in enumerate(places)]

    def __enter__(self):
        for worker in self.workers:
            worker.start()
        return self

    def __exit__(self, kind, value, trace):
        if kind is not None:
            print("the plan:\n" + "\n".join(self.plan))
            print(f"engine: {self.status()}, clients {[w.state for w in self.workers]}")
        for worker in self.workers:
            worker._crash.set()

    def note(self, text):
        self.plan.append(f"{time.monotonic() - self.began:7.2f} {text}")

    # Processes

    def replica(self, node):
        """What `plane.daemon` knows it by."""
        return f"{node}/run/r-{self.ids[node]}"

    def victim(self):
        """The node of the replica whose turn it is: one that ended just now is started late."""
        self.victims.append(self.victims.pop(0))
        return self.victims[-1]

    def kill(self, *names):
        for name in names:
            self.plane.kill(self.plane.daemon(name))

    @contextlib.contextmanager
    def away(self, name, how):
        """The controller or an agent, killed and started again or stopped and continued."""
        self.note(f"{name} {how}")
        pid = self.plane.daemon(name)
        if how == "killed":
            self.plane.kill(pid)
        else:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            self.note(f"{name} back")
            if how == "killed":
                self.plane.up()
            else:
                os.kill(pid, signal.SIGCONT)

    def status(self):
        """The engine's, empty while there is none that answers."""
        with contextlib.suppress(OSError, ControlError):
            return control(self.plane.cluster / f"{self.engine}.sock", "status", 3)
        return {}

    def state(self, node):
        return self.status().get(f"replica.{self.ids[node]}", "unknown")

    # Waits

    def check(self):
        """Raises what went wrong so far."""
        if self.checker.violation:
            raise self.checker.violation
        for worker in self.workers:
            if worker.failure:
                raise worker.failure

    def wait(self, condition, what, timeout=CONVERGENCE):
        def met():
            self.check()
            return condition()
        return wait_for(met, what, timeout)

    def progress(self, requests=50):
        goals = [(w, w.completed + requests) for w in self.workers]
        self.wait(lambda: all(w.completed >= goal for w, goal in goals),
                  f"{requests} more answers to each client")

    def answered_for(self, seconds):
        """Every client still gets answers that much later."""
        end = time.monotonic() + seconds
        self.wait(lambda: all(w.last_answer >= end for w in self.workers),
                  f"answers {seconds} s later")

    def held(self):
        """Nobody gets an answer, and nobody an error."""
        self.wait(lambda: all(time.monotonic() - w.last_answer > HELD for w in self.workers),
                  "every request to wait")

    def is_healthy(self):
        status = self.status()
        return (status.get("state") == "serving" and status.get("storeAvailable") == "true"
                and int(status.get("unresolvedRegions", 0)) == 0
                and all(status.get(f"replica.{i}") == "inSync" for i in self.ids.values()))

    def converge(self):
        """All in sync, all resolved, everybody answered; how long it took, seconds."""
        begun = time.monotonic()
        self.wait(self.is_healthy, "all replicas to be in sync")
        self.progress()
        return time.monotonic() - begun

    def finish(self):
        """Detached; all copies are compared with each other and with the history."""
        self.converge()
        self.plane.until("the controller to see it", lambda v: v["robustness"] == "healthy")
        for worker in self.workers:
            worker.stop()
        self.check()
        self.plane.run("volume", "detach", self.plane.name)
        replicas = self.plane.volume()["replicas"]
        assert len(replicas) == 3 and all(r["inSync"] for r in replicas), replicas
        self.plane.kill_all()
        copies = [Copy(replica["directory"]) for replica in replicas]
        for copy in copies:
            copy.verify()
        with contextlib.ExitStack() as stack:
            compare(self.checker, self.size, [
                stack.enter_context(copy.export()) for copy in copies])
        return self.checker.judged


# Faults of the control plane alone: nobody waits for it.

def controller_away(volume, how):
    with volume.away("controller", how):
        volume.answered_for(2)


def agent_away(volume, how):
    with volume.away(volume.random.choice(volume.nodes), how):
        volume.answered_for(1)


def everything_away(volume):
    """The whole control plane at once."""
    volume.note("controller and agents killed")
    volume.kill("controller", *volume.nodes)
    volume.answered_for(1)
    volume.plane.up()


# A second fault, which needs what is away.

def engine_without_controller(volume, how):
    """The agent starts it again by what it was told last; it waits for the record."""
    with volume.away("controller", how):
        before = volume.plane.daemon(volume.engine)
        volume.note("engine killed")
        volume.kill(volume.engine)
        volume.wait(lambda: volume.plane.daemon(volume.engine) != before, "the next engine")
        volume.held()


def engine_without_agent(volume, how):
    """Nobody starts it again."""
    with volume.away(volume.home, how):
        volume.note("engine killed")
        volume.kill(volume.engine)
        volume.held()


def replica_without_controller(volume, how):
    """The record cannot say that it is gone, so nothing may be acknowledged without it."""
    epoch = volume.status()["epoch"]
    with volume.away("controller", how):
        node = volume.victim()
        volume.note(f"replica of {node} killed")
        volume.kill(volume.replica(node))
        volume.held()
        assert volume.status()["epoch"] == epoch, volume.status()
    volume.wait(lambda: volume.status().get("epoch", epoch) != epoch, "the record to change")


def replica_without_agent(volume, how):
    """It stays away, and the volume does without it."""
    node = volume.victim()
    with volume.away(node, how):
        volume.note(f"replica of {node} killed")
        volume.kill(volume.replica(node))
        volume.answered_for(1)
        assert volume.state(node) == "absent", volume.status()


def controller_during_rejoin(volume, how):
    for _ in range(10):
        if is_rejoin_cut_off(volume, how):
            return
        volume.note("too late")
        volume.converge()
    raise AssertionError("every rejoin was over before the controller was away")


def is_rejoin_cut_off(volume, how):
    """A replica comes back and is stopped in the middle until the controller is away: it cannot
    become a member."""
    node = volume.victim()
    volume.note(f"replica of {node} killed")
    before = volume.plane.daemon(volume.replica(node))
    volume.plane.kill(before)
    volume.wait(lambda: volume.state(node) == "absent", "the loss")
    volume.wait(lambda: volume.plane.daemon(volume.replica(node)) != before, "the next process")
    volume.wait(lambda: volume.state(node) in ("joining", "inSync"), "the rejoin")
    pid = volume.plane.daemon(volume.replica(node))
    os.kill(pid, signal.SIGSTOP)
    try:
        with volume.away("controller", how):
            if volume.state(node) != "joining":
                return False
            os.kill(pid, signal.SIGCONT)
            volume.answered_for(1)
            assert volume.state(node) != "inSync", volume.status()
            return True
    finally:
        os.kill(pid, signal.SIGCONT)


FAULTS = [functools.partial(fault, how=how) for how in ("killed", "stopped") for fault in (
    controller_away, agent_away, engine_without_controller, engine_without_agent,
    replica_without_controller, replica_without_agent, controller_during_rejoin)]
FAULTS.append(everything_away)
