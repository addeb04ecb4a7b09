"""A volume under attack: its processes, what keeps them running, its clients and their judge."""

import contextlib
import random
import shutil
import signal
import subprocess
import threading
import time

import nbd

from harness.cluster import MIB, Cluster, ControlError, control, wait_for
from harness.context import SkipTest
from harness.disks import WriteLimit

from .checker import READ, Checker
from .copies import compare_replicas
from .data import CELL
from .network import Network
from .snapshots import Administrator
from .workers import Worker

HOSTS = ["engine", "store", "client", "replica1", "replica2", "replica3"]
CONVERGENCE = 90.0  # seconds from the end of all faults to: all in sync, everyone answered
REPAIRS_MAX = 6
DISK = 420 * MIB  # of the one replica whose file system can fill up


class Volume:
    """Three replicas and an engine, each on a host of its own, one client or more.

    A supervisor starts again what ended, as node agents do. `held` processes stay down.
    """

    def __init__(self, context, clients, seed, size=96 * MIB, trace=None):
        self.random = random.Random(seed)
        self.size, self.clients = size, clients
        self.trace = trace or (lambda line: None)
        self.checker = Checker()
        self.workers, self.crashed, self.answered = [], 0, 0
        self.backend = context.backend
        self.held = set()  # replica numbers, "engine"
        self.generation = 1
        self.ill = set()  # replicas whose files were harmed: may need to be made anew
        self.incurable = set()  # those of them whose damage no other copy repairs
        self.made_anew = self.harmed_below = 0
        self.scrubs = 0
        self.administrator = Administrator(self, seed)
        self.plan = []
        self._stack = contextlib.ExitStack()
        self._halt = threading.Event()
        self._lock = threading.RLock()
        self._clients_lock = threading.RLock()
        self._starts = {}
        self.supervisor_error = None

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self.network = stack.enter_context(Network(HOSTS))
            self.cluster = stack.enter_context(Cluster(
                size=self.size, environment={"HAPTERA_IO": self.backend}, network=self.network))
            small = self.cluster.replicas[2]
            small.directory = self._small_disk(stack) / "replica"
            self.limit = self._write_limit(stack, small.directory.parent)
            self.cluster.up()
            self.cluster.engine.status()
            self._supervisor = threading.Thread(target=self._supervise, daemon=True)
            self._supervisor.start()
            self._stack = stack.pop_all()
        self._start_workers()
        return self

    def __exit__(self, kind, value, trace):
        self.administrator.leave()
        self._halt.set()
        self._supervisor.join()
        for worker in self.workers:
            worker._crash.set()
        if kind is not None:
            print("the plan:\n" + "\n".join(self.plan))
            with contextlib.suppress(OSError, ControlError):
                print(f"engine: {self.cluster.engine.status()}")
        self._stack.__exit__(kind, value, trace)

    def _small_disk(self, stack):
        """A loop-mounted ext4: it can be filled without harm."""
        image, mount = self.cluster.path / "disk.img", self.cluster.path / "disk"
        mount.mkdir()
        with open(image, "wb") as file:
            file.truncate(DISK)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-b", "4096", image], check=True)
        done = subprocess.run(["mount", "-o", "loop", image, mount], capture_output=True)
        self.can_fill = done.returncode == 0
        # Pushed before the cluster's own end: unmounted while its directory is there.
        stack.callback(lambda: subprocess.run(["umount", "-l", mount], capture_output=True))
        return mount

    def _write_limit(self, stack, mount):
        """Of that disk; nil where the kernel has no control group for it."""
        if self.can_fill:
            with contextlib.suppress(SkipTest):
                return stack.enter_context(WriteLimit(mount))
        return None

    def note(self, text):
        line = f"{time.monotonic() - self._began:7.2f} {text}" if self.plan else f"   0.00 {text}"
        if not self.plan:
            self._began = time.monotonic()
        self.plan.append(line)
        self.trace(line)

    # Processes

    def _supervise(self):
        while not self._halt.wait(0.05):
            try:
                with self._lock:
                    self._look_after()
            except Exception as error:
                self.supervisor_error = error
                return

    def _look_after(self):
        for replica in self.cluster.replicas:
            if replica.number not in self.held and not replica.process.is_running:
                self._restart_replica(replica)
        engine = self.cluster.engine
        if "engine" not in self.held and not engine.process.is_running:
            # Older lives have unlinked nothing of ours: the addresses stay the same.
            self.cluster.start_engine(self.generation, wait=False, before=engine)
        elif engine.instance is None and engine.control.exists():
            with contextlib.suppress(OSError, ControlError):
                engine.status(0.2)

    def _restart_replica(self, replica):
        now = time.monotonic()
        starts = self._starts.setdefault(replica.number, [])
        if starts and now - starts[-1] < min(0.2 * 2 ** len(starts), 3):
            return
        was_killed = replica.process.wait() < 0 or replica.environment
        # What is known to be past repair is replaced soon, though it may live for a while each time.
        is_incurable = replica.number in self.incurable
        starts[:] = [t for t in starts if now - t < (60 if is_incurable else 10)] + (
            [] if was_killed else [now])
        if len(starts) > (1 if is_incurable else 4) and self._others_have_all(replica):
            if replica.number not in self.ill:
                raise AssertionError(
                    f"replica {replica.number} ends whenever it is started: "
                    + self.cluster.tail(replica.process))
            self.note(f"replica {replica.number} cannot be started: made anew")
            self.make_anew(replica)
            starts.clear()
        replica.spawn()

    def _others_have_all(self, replica):
        """Nobody throws a copy away while it may be the only one of something."""
        me = (replica.id, replica.incarnation)
        return any(member != me for member in self.cluster.record().in_sync)

    def make_anew(self, replica):
        """What a controller does about a lost copy: an empty one, under a new incarnation."""
        for entry in replica.directory.glob("*") if replica.directory.exists() else ():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        replica.recreate()
        self.made_anew += 1
        self.ill.discard(replica.number)
        self.incurable.discard(replica.number)

    def kill(self, target):
        """kill -9; `target` is a replica or "engine"."""
        with self._lock:
            self._process(target).kill()

    def hold(self, target):
        with self._lock:
            self.held.add(self._key(target))
            self._process(target).kill()

    def release(self, target):
        with self._lock:
            self.held.discard(self._key(target))

    def signal(self, target, number):
        with self._lock:
            process = self._process(target)
            if process.is_running:
                process.signal(number)

    def _key(self, target):
        return target if target == "engine" else target.number

    def _process(self, target):
        return self.cluster.engine.process if target == "engine" else target.process

    def status(self):
        """The engine's, empty while there is none that answers."""
        with contextlib.suppress(OSError, ControlError):
            return self.cluster.engine.status(3)
        return {}

    def state(self, replica):
        return self.status().get(f"replica.{replica.text}", "unknown")

    def is_member(self, replica):
        return (replica.id, replica.incarnation) in self.cluster.record().in_sync

    # Clients

    def _start_workers(self):
        for _ in range(self.clients):
            self.add_worker()

    def add_worker(self):
        with self._clients_lock:
            self._add_worker()

    def _add_worker(self):
        number = len(self.workers) + self.crashed
        engine = self.cluster.engine
        over_tcp = number % 2 == 0
        address = (self.network.address("engine"), engine.port) if over_tcp else engine.unix
        self.workers.append(Worker(
            self.checker, number, address, self.size // CELL, self.random.getrandbits(32),
            inside=(lambda: self.network.inside("client")) if over_tcp
            else contextlib.nullcontext,
            depth=self.random.choice((1, 4, 8, 16)), patience=self.random.uniform(4, 12)).start())

    def crash_worker(self):
        """A client dies with its requests, and another one comes."""
        with self._clients_lock:
            if self.workers:
                worker = self.workers[self.random.randrange(len(self.workers))]
                worker.crash()
                self._dismiss([worker])
                self.add_worker()

    def _dismiss(self, workers):
        for worker in workers:
            self.workers.remove(worker)
            self.crashed += 1
            self.answered += worker.completed

    @contextlib.contextmanager
    def without_clients(self, patience=3.0):
        """All leave, or die if they have to wait for answers; others come in the end."""
        with self._clients_lock:
            end = time.monotonic() + patience
            for worker in self.workers:
                worker.ask_to_stop()
            for worker in self.workers:
                if not worker.has_stopped(max(end - time.monotonic(), 0)):
                    worker.crash()
                if worker.failure:
                    raise worker.failure
            self._dismiss(list(self.workers))
        try:
            yield
        finally:
            if not self._halt.is_set():
                self._start_workers()

    @property
    def requests(self):
        """Answered to clients so far."""
        with self._clients_lock:
            return self.answered + sum(w.completed for w in self.workers)

    def check(self):
        """Raises what went wrong so far."""
        if self.checker.violation:
            raise self.checker.violation
        if self.supervisor_error:
            raise self.supervisor_error
        for worker in list(self.workers):
            if worker.failure:
                raise worker.failure
        if self.administrator.failure:
            raise self.administrator.failure
        if self.cluster.store.violations:
            raise AssertionError(f"the store saw: {self.cluster.store.violations}")

    def wait(self, condition, what, timeout=CONVERGENCE):
        def met():
            self.check()
            return condition()
        wait_for(met, what, timeout)

    def pass_time(self, seconds):
        end = time.monotonic() + seconds
        self.wait(lambda: time.monotonic() >= end, "time to pass", seconds + 60)

    def progress(self, requests, timeout=CONVERGENCE):
        """Of each client; of one that comes meanwhile, from its beginning."""
        begun = {w: w.completed for w in self.workers}

        def are_answered():
            workers = list(self.workers)
            return len(workers) == self.clients and all(
                w.completed >= begun.get(w, 0) + requests for w in workers)
        self.wait(are_answered, f"{requests} more answers to each client", timeout)

    # The end of a round

    def heal(self):
        self.network.heal()
        if self.limit:
            self.limit.lift()
        if not self.cluster.store.is_running:
            self.cluster.start_store()
        with self._lock:
            self.held.clear()
            for target in [*self.cluster.replicas, "engine"]:
                self.signal(target, signal.SIGCONT)
            for replica in self.cluster.replicas:
                if replica.environment:
                    replica.environment = {}
                    replica.process.kill()

    def converge(self):
        """All in sync, all resolved, every client answered; how long it took, seconds."""
        start = time.monotonic()
        try:
            with self.administrator.at_rest():
                # A silence before the end of the faults may cost a replica its place after it.
                while True:
                    self.wait(self._is_healthy, "all replicas to be in sync")
                    self.progress(20, max(5.0, CONVERGENCE - (time.monotonic() - start)))
                    if self._is_healthy():
                        break
        except AssertionError as error:
            raise AssertionError(
                f"{error}; status {self.status()}, clients "
                f"{[w.state for w in self.workers]}") from None
        return time.monotonic() - start

    def _is_healthy(self):
        status = self.status()
        return (status.get("state") == "serving"
                and int(status.get("unresolvedRegions", 0)) == 0
                and all(status.get(f"replica.{r.text}") == "inSync" and self.is_member(r)
                        for r in self.cluster.replicas))

    def finish_round(self):
        """Everything is read, then all copies are compared with each other and the history."""
        self.administrator.finish()
        for worker in self.workers:
            worker.stop()
        for attempt in range(REPAIRS_MAX):
            self.sweep()
            if self.ill:
                self.scrub()
            self.wait(self._is_healthy, "all replicas to be in sync")
            with self._lock:
                self.held |= {"engine", 1, 2, 3}
            self.cluster.engine.detach()
            for replica in self.cluster.replicas:
                replica.shutdown()
            # One may have been lost in the very moment of the detach.
            if self._verify(attempt) and all(map(self.is_member, self.cluster.replicas)):
                break
            self._restart()
        self.ill.clear()
        self.incurable.clear()
        compare_replicas(self.checker, self.size, self.cluster.replicas)
        self.administrator.compare(self.cluster.record(), self.size, self.cluster.replicas)
        self.check()

    def _verify(self, attempt):
        """Damage that was done is repaired when it is read, from whichever copy that is."""
        is_clean = True
        for replica in self.cluster.replicas:
            try:
                replica.verify()
            except AssertionError as error:
                if replica.number not in self.ill or attempt + 1 == REPAIRS_MAX:
                    raise
                self.note(f"not read yet: {error}")
                if replica.number in self.incurable:
                    self.make_anew(replica)
                is_clean = False
        return is_clean

    def scrub(self):
        """Reads every layer of every copy, and repairs what is bad there."""
        self.wait(self._is_healthy, "all replicas to be in sync")
        self.scrubs += 1
        control(self.cluster.engine.control, "scrub", **{"from": f"{self.scrubs}:0:0:0:0:0:0"})

        def is_done():
            status = self.status()
            return (status.get("scrub.state") == "finished"
                    and status["scrub"].startswith(f"{self.scrubs}:"))
        self.wait(is_done, "the scrub's end")
        found = self.status()["scrub"].split(":")
        self.note(f"a scrub repaired {found[4]} of {found[3]} bad blocks")
        assert found[5] == "0", f"no copy is good of some blocks: {found}"

    def sweep(self):
        """Reads the whole volume once, several requests at a time."""
        handle = nbd.NBD()
        handle.set_export_name("volume")
        handle.connect_unix(str(self.cluster.engine.unix))
        step, failures, waiting = 256 * 1024, [], [0]

        def send(offset):
            attempt = self.checker.begin(READ, offset // CELL, step // CELL)
            buffer = bytearray(step)

            def done(error):
                waiting[0] -= 1
                number = error.value if hasattr(error, "value") else error
                try:
                    assert number == 0, f"a read at {offset} was answered with errno {number}"
                    self.checker.finish_read(attempt, bytes(buffer))
                except AssertionError as failure:
                    failures.append(failure)
                return 1
            waiting[0] += 1
            handle.aio_pread(buffer, offset, done)

        offsets = list(range(0, self.size, step))
        self.random.shuffle(offsets)
        while offsets or waiting[0]:
            while offsets and waiting[0] < 12:
                send(offsets.pop())
            handle.poll(1000)
        handle.shutdown()
        if failures:
            raise failures[0]

    def next_round(self, seed):
        """Everything starts again where it ended; the clients are new ones."""
        self.random.seed(seed)
        self.generation += 1
        self.crashed += len(self.workers)
        self.answered += sum(w.completed for w in self.workers)
        self.workers.clear()
        self.checker.fence_all()
        self._restart()
        self._start_workers()

    def _restart(self):
        engine = self.cluster.engine
        for replica in self.cluster.replicas:
            replica.start()
        self.cluster.start_engine(self.generation, before=engine)
        self.cluster.engine.status()
        with self._lock:
            self.held.clear()
