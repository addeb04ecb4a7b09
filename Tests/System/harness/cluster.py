"""Engines, replicas and a record store as real processes in a scratch directory."""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time

from .frames import Record
from .store import RecordStore

ROOT = pathlib.Path(__file__).resolve().parents[3]
BINARIES = pathlib.Path(os.environ.get("HAPTERA_BIN", ROOT / ".build-release/release"))
# Of the control plane, whose speed does not matter.
CONTROL_BINARIES = pathlib.Path(os.environ.get("HAPTERA_CONTROL_BIN", ROOT / ".build/debug"))
SCRATCH = os.environ.get("HAPTERA_TEST_DIR", "/var/tmp")
# Where a replica's process notes that a sync failed, besides its directory.
MARKS = pathlib.Path("/dev/shm")
MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40


def wait_for(condition, what, timeout=60.0):
    """Polls until `condition()` is true; its value."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout:.0f} s in vain for {what}")
        time.sleep(0.01)


PORTS_GIVEN = set()


def free_port():
    # Below the ephemeral range, so that no outgoing connection takes it between two starts; each
    # once, since it is used only later.
    while True:
        port = random.randrange(20000, 32000)
        if port in PORTS_GIVEN:
            continue
        PORTS_GIVEN.add(port)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue


class ControlError(Exception):
    pass


def control(path, verb, timeout=60.0, **arguments):
    """One command over a control socket; the reply's keys."""
    line = " ".join([verb] + [f"{k}={v}" for k, v in arguments.items()]) + "\n"
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout)
        connection.connect(str(path))
        connection.sendall(line.encode())
        reply = b""
        while not reply.endswith(b"\n\n"):
            part = connection.recv(65536)
            if not part:
                break
            reply += part
    lines = reply.decode().splitlines()
    if not lines or lines[0] != "ok":
        raise ControlError(lines[0] if lines else "hung up")
    return dict(line.split("=", 1) for line in lines[1:] if "=" in line)


@functools.cache
def engine_knows(option):
    done = subprocess.run(
        [BINARIES / "haptera-engine", "--help"], capture_output=True, text=True, check=False)
    return option in done.stdout + done.stderr


class Process:
    """A child process whose output goes to a file, and which dies with its owner."""

    def __init__(self, name, arguments, log, environment=None):
        self.name, self.log = name, log
        with open(log, "ab") as output:
            self.child = subprocess.Popen(
                [str(a) for a in arguments], stdout=output, stderr=output,
                env={**os.environ, **(environment or {})})

    @property
    def pid(self):
        return self.child.pid

    @property
    def is_running(self):
        return self.child.poll() is None

    def signal(self, number):
        self.child.send_signal(number)

    def kill(self):
        if self.is_running:
            self.child.kill()
        self.child.wait()

    def wait(self, timeout=60.0):
        return self.child.wait(timeout)

    def cpu_seconds(self):
        fields = pathlib.Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def wakeups(self):
        """Times a thread of it has slept and was woken."""
        statuses = pathlib.Path(f"/proc/{self.pid}/task").glob("*/status")
        return sum(int(line.split()[1]) for status in statuses
                   for line in status.read_text().splitlines()
                   if line.startswith("voluntary_ctxt_switches:"))

    def rss_bytes(self):
        for line in pathlib.Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        return 0


class Copy:
    """A replica's directory, as the offline tool sees it."""

    def __init__(self, directory):
        self.directory = pathlib.Path(directory)

    def tool(self, verb, *arguments):
        """What it prints; the process must be down."""
        command = [
            BINARIES / "haptera-replica", verb, "--dir", self.directory, *map(str, arguments)]

        def ended():
            done = subprocess.run(command, capture_output=True)
            # The kernel takes a ring apart after its process has ended, and the locks with it.
            return b"is in use" not in done.stderr and done
        done = wait_for(ended, f"the locks of {self.directory}", 30)
        assert done.returncode == 0, (
            f"haptera-replica {verb}: exit {done.returncode}: {done.stderr.decode()}"
            f"{done.stdout.decode()[-2000:]}")
        return done.stdout

    def verify(self):
        report = json.loads(self.tool("verify", "--json"))
        faults = [report[key] for key in ("mismatches", "damagedPages", "doubtful")]
        assert faults == [0, 0, 0], report

    @contextlib.contextmanager
    def export(self, snapshot=None):
        """The raw image, to be read to its end; the process must be down."""
        which = ["--snapshot", snapshot] if snapshot else []
        child = subprocess.Popen(
            [BINARIES / "haptera-replica", "export", "--dir", self.directory, *which,
             "--output", "-"], stdout=subprocess.PIPE)
        try:
            yield child.stdout
            assert child.wait() == 0, f"export of {self.directory} failed"
        finally:
            child.kill()
            child.stdout.close()


class Replica(Copy):
    def __init__(self, cluster, number, directory=None):
        super().__init__(directory or cluster.path / f"replica-{number}")
        self.cluster, self.number = cluster, number
        self.id = random.getrandbits(63) | 1
        self.incarnation = random.getrandbits(63) | 1
        self.host = f"replica{number}"
        self.port = free_port()
        self.control = cluster.path / f"replica-{number}.sock"
        self.process = None
        self.environment = {}

    @property
    def text(self):
        return f"{self.id:016x}"

    @property
    def endpoint(self):
        return f"{self.cluster.address(self.host)}:{self.port}"

    def create(self):
        self.tool(
            "create", "--volume-id", self.cluster.volume_text, "--volume", self.cluster.name,
            "--replica-id", self.text, "--incarnation", f"{self.incarnation:016x}",
            "--size", self.cluster.size)

    def recreate(self):
        """A new, empty making of the same replica."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.incarnation = random.getrandbits(63) | 1
        self.create()

    def spawn(self):
        self.process = Process(
            f"replica {self.number}",
            [*self.cluster.enter(self.host), BINARIES / "haptera-replica", "serve",
             "--dir", self.directory, "--listen", self.endpoint, "--control", self.control],
            self.cluster.path / f"replica-{self.number}.log",
            {**self.cluster.environment, **self.environment})

    def start(self):
        self.spawn()
        wait_for(self.answers, f"replica {self.number} to answer")

    def answers(self):
        if not self.process.is_running:
            raise AssertionError(f"replica {self.number} exited: {self.cluster.tail(self.process)}")
        try:
            return control(self.control, "ping", 5) is not None
        except (OSError, ControlError):
            return False

    def status(self):
        return control(self.control, "status")

    @property
    def lasting_layers(self):
        """Layers, but for a deleted one that stays below the head, being the larger one."""
        status = self.status()
        return int(status["layers"]) - int(status["stayingLayers"])

    def shutdown(self):
        if self.process and self.process.is_running:
            try:
                control(self.control, "shutdown")
            except (OSError, ControlError):
                pass  # it may hang up before its reply arrives
            assert self.process.wait() == 0, self.cluster.tail(self.process)

    def export_digest(self):
        """SHA-256 of the raw image; the process must be down."""
        digest, count = hashlib.sha256(), 0
        with self.export() as image:
            while part := image.read(MIB):
                digest.update(part)
                count += len(part)
        assert count == self.cluster.size, f"export has {count} bytes"
        return digest.hexdigest()


class Engine:
    """One engine process; the next life of the volume's engine is a new object.

    `before`: the engine whose place and addresses it takes, as a node agent would start it again.
    """

    def __init__(self, cluster, replicas, client_generation=1, environment=None, before=None):
        self.cluster = cluster
        number = cluster.engine_count = cluster.engine_count + 1
        self.port = before.port if before else free_port()
        self.control = cluster.path / f"engine-{number}.sock"
        self.unix = before.unix if before else cluster.path / f"nbd-{number}.sock"
        self.instance = None  # known once it was asked
        arguments = [
            *cluster.enter("engine"), BINARIES / "haptera-engine", "--volume", cluster.name,
            "--volume-id", cluster.volume_text,
            "--store", f"{cluster.address('store')}:{cluster.store.port}",
            "--nbd", f"{cluster.address('engine')}:{self.port}", "--nbd-unix", self.unix,
            "--control", self.control, "--client-generation", client_generation,
            *cluster.engine_options]
        if before and before.instance and engine_knows("--ended-instance"):
            arguments += ["--ended-instance", before.instance]
        for replica in replicas:
            arguments += ["--replica", f"{replica.text}={replica.endpoint}"]
        self.process = Process(
            f"engine {number}", arguments, cluster.path / f"engine-{number}.log",
            {**cluster.environment, **(environment or {})})

    def status(self, timeout=60.0):
        status = control(self.control, "status", timeout)
        self.instance = status.get("instance", self.instance)
        return status

    def metrics(self):
        return control(self.control, "metrics")

    def is_serving(self):
        if not self.process.is_running:
            raise AssertionError(f"engine exited: {self.cluster.tail(self.process)}")
        try:
            return self.status().get("state") == "serving"
        except (OSError, ControlError):
            return False

    def state(self, replica):
        return self.status().get(f"replica.{replica.text}")

    def wait_serving(self, timeout=60.0):
        wait_for(self.is_serving, "the engine to serve", timeout)

    def wait_state(self, replica, state, timeout=120.0):
        wait_for(
            lambda: self.state(replica) == state, f"replica {replica.number} to be {state}",
            timeout)

    def detach(self):
        try:
            control(self.control, "detach")
        except ConnectionError:
            pass
        assert self.process.wait() == 0, self.cluster.tail(self.process)


class Cluster:
    """A volume of its own with a store, replicas and at most one engine at a time."""

    name = "volume"

    def __init__(self, size=256 * MIB, replicas=3, environment=None, network=None):
        self.path = pathlib.Path(tempfile.mkdtemp(prefix="haptera-", dir=SCRATCH))
        self.size = size
        self.environment = environment or {}
        self.network = network  # nil: everything on loopback
        self.engine_options = []
        self.engine_count = 0
        high, low = random.getrandbits(64), random.getrandbits(64)
        self.volume = high.to_bytes(8, "little") + low.to_bytes(8, "little")
        self.volume_text = f"{high:016x}{low:016x}"
        self.store = RecordStore(self.address("store"))
        self.replicas = [Replica(self, n + 1) for n in range(replicas)]
        self.engine = None
        self._engines = []

    def __enter__(self):
        return self

    def address(self, host):
        return self.network.address(host) if self.network else "127.0.0.1"

    def enter(self, host):
        return self.network.enter(host) if self.network else []

    def inside(self, host):
        return self.network.inside(host) if self.network else contextlib.nullcontext()

    def __exit__(self, kind, value, trace):
        for process in [e.process for e in self._engines] + [
                r.process for r in self.replicas if r.process]:
            if process.is_running:
                process.signal(signal.SIGCONT)
            process.kill()
        self.stop_store()
        for replica in self.replicas:
            for mark in MARKS.glob(f"haptera-failed-sync-{replica.text}-*"):
                mark.unlink()
        if kind is not None:
            for log in sorted(self.path.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}")
        if kind is None or "HAPTERA_KEEP" not in os.environ:
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            print(f"kept: {self.path}")
        if kind is None and self.store.violations:
            raise AssertionError(f"the store saw: {self.store.violations}")

    def up(self):
        """Creates and starts everything and waits until the volume is served."""
        for replica in self.replicas:
            replica.create()
        self.store.put(Record(
            self.volume, self.name, self.size,
            [(r.id, r.incarnation) for r in self.replicas]))
        self.start_store()
        self.start_replicas()
        self.start_engine()
        return self

    def start_store(self):
        with self.inside("store"):
            self.store.start()

    def stop_store(self):
        if self.store.is_running:
            self.store.stop()

    def start_replicas(self):
        for replica in self.replicas:
            if not (replica.process and replica.process.is_running):
                replica.start()

    def start_engine(self, client_generation=1, wait=True, before=None):
        self.engine = Engine(self, self.replicas, client_generation, before=before)
        self._engines.append(self.engine)
        if wait:
            self.engine.wait_serving()
        return self.engine

    def wait_healthy(self, timeout=180.0):
        for replica in self.replicas:
            self.engine.wait_state(replica, "inSync", timeout)

    def record(self):
        return self.store.record(self.volume)

    def processes(self):
        return [self.engine.process] + [r.process for r in self.replicas]

    def tail(self, process):
        return process.log.read_text(errors="replace")[-1500:]

    def check_copies(self):
        """Detaches, stops the replicas, and shows that all copies are equal and undamaged."""
        if self.engine.process.is_running:
            self.engine.detach()
        for replica in self.replicas:
            replica.shutdown()
        for replica in self.replicas:
            replica.verify()
        digests = {r.export_digest() for r in self.replicas}
        assert len(digests) == 1, f"exports differ: {digests}"
        return digests.pop()
