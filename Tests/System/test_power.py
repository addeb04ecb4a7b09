"""Power cuts under a real kernel: all that its disks had not flushed may be gone, or half there."""

import hashlib
import pathlib
import random
import shutil
import tempfile
import time

from harness.cluster import BINARIES, MIB, SCRATCH, Replica, free_port, wait_for
from harness.context import once
from harness.frames import Record
from harness.guest import HOST, Guest, prepare
from harness.lossy_disk import LossyDisk
from harness.store import RecordStore
from harness.workload import (
    BLOCK, History, Workload, check_all, check_all_after_cut, connect)

SIZE = 32 * MIB
BLOCKS = SIZE // BLOCK
DISK = 512 * MIB
VOLUME = bytes(range(16))
# Seldom, so that there is something to lose.
FLUSHES = 0.001
# Of what was not flushed, how much has arrived when the power is cut.
KEPT = (0.0, 0.1, 0.5, 0.9)
MAKE = {"ext4": "mkfs.ext4 -q", "xfs": "mkfs.xfs -q -f"}


class Machine:
    """Three replicas and the engine on one machine, each replica on a disk and file system of its
    own; the record store and the client are elsewhere and live on."""

    def __init__(self, backend, seed, file_system):
        self.backend, self.file_system = backend, file_system
        self.chance = random.Random(seed)
        self.path = pathlib.Path(tempfile.mkdtemp(prefix="haptera-power-", dir=SCRATCH))
        self.disks = [LossyDisk(DISK, self.path) for _ in range(3)]
        self.store = RecordStore()
        self.store.put(Record(VOLUME, "volume", SIZE, [(n, n + 16) for n in (1, 2, 3)]))
        self.store.start()
        self.port = free_port()
        self.uri = f"nbd://127.0.0.1:{self.port}/volume"
        self.boots = self.generation = self.decisions = 0
        self.is_remembered = False
        self.guest = None

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self.guest:
            if kind is not None:
                print(self.guest.console_text())
            self.guest.cut_power()
        self.store.stop()
        for disk in self.disks:
            disk.close()
        shutil.rmtree(self.path, ignore_errors=True)
        if kind is None:
            assert not self.store.violations, self.store.violations

    def boot(self):
        self.guest = Guest(self.path, [disk.uri for disk in self.disks], {self.port: 10809})
        for number, device in enumerate("abc", 1):
            place = f"/run/{number}"
            if self.boots == 0:
                self.guest.run(f"{MAKE[self.file_system]} /dev/vd{device}")
            self.guest.run(f"mkdir {place} && mount /dev/vd{device} {place}")
            if self.boots == 0:
                self.guest.run(
                    f"{BINARIES}/haptera-replica create --dir {place}/replica --volume-id "
                    f"{self._volume()} --volume volume --replica-id {number:016x} "
                    f"--incarnation {number + 16:016x} --size {SIZE}")
        self.boots += 1

    @staticmethod
    def _volume():
        high, low = (int.from_bytes(half, "little") for half in (VOLUME[:8], VOLUME[8:]))
        return f"{high:016x}{low:016x}"

    def start(self, client_lives=False):
        """Boots, starts what was running, and waits until the volume is served again; how long.

        `client_lives`: it remembers what was acknowledged, so the loss of that must be accepted.
        """
        self.boot()
        self.is_remembered = client_lives
        self.generation += not client_lives
        names = ""
        for number in (1, 2, 3):
            self._spawn(
                f"replica{number}", f"haptera-replica serve --dir /run/{number}/replica "
                f"--listen 127.0.0.1:{7000 + number} --control /run/replica{number}.sock")
            names += f" --replica {number:016x}=127.0.0.1:{7000 + number}"
        self._spawn(
            "engine", f"haptera-engine --volume volume --volume-id {self._volume()} "
            f"--store {HOST}:{self.store.port} --nbd 0.0.0.0:10809 --control /run/engine.sock "
            f"--client-generation {self.generation}{names}")
        start = time.monotonic()
        wait_for(self._is_served, "the volume to be served", 300)
        return time.monotonic() - start

    def _spawn(self, name, command):
        self.guest.run(
            f"HAPTERA_IO={self.backend} setsid {BINARIES}/{command} >/run/{name}.log 2>&1 &")

    def _is_served(self):
        ended = self.guest.run(
            "for n in replica1 replica2 replica3 engine; do pgrep -f /run/$n.sock >/dev/null "
            "|| { echo $n has ended; tail -n 20 /run/$n.log; }; done")
        assert not ended, ended
        try:
            status = self.guest.control("engine", "status")
        except AssertionError:
            return False  # it does not listen yet
        if status["needsDecision"] == "true":
            assert self.is_remembered, "a decision is asked though nobody remembers"
            self.guest.control("engine", "accept-loss")
            self.decisions += 1
        return status["state"] == "serving"

    def cut_power(self):
        self.guest.cut_power()
        self.guest = None
        kept = self.chance.choice(KEPT)
        for disk in self.disks:
            disk.lose(self.chance, kept)

    def check_copies(self):
        """Detached in order, the three copies are whole and the same, and so are file systems."""
        self.guest.control("engine", "detach")
        self.guest.run("pidwait haptera-engine || true")
        for number in (1, 2, 3):
            self.guest.control(f"replica{number}", "shutdown", check=False)
        self.guest.run("pidwait haptera || true")
        digests = set()
        for number, device in enumerate("abc", 1):
            tool = f"{BINARIES}/haptera-replica"
            self.guest.run(f"{tool} verify --dir /run/{number}/replica")
            digests.add(self.guest.run(
                f"set -o pipefail; {tool} export --dir /run/{number}/replica --output - "
                "| sha256sum"))
            check = {"ext4": "e2fsck -fn", "xfs": "xfs_repair -n"}[self.file_system]
            self.guest.run(f"umount /run/{number} && {check} /dev/vd{device}")
        assert len(digests) == 1, f"the copies differ: {digests}"


class Snapshots:
    """What each snapshot held when it had just been taken, as its readers see it."""

    def __init__(self, machine):
        self.machine = machine
        self.digests = {}
        self.taken = self.deleted = 0

    def take(self):
        self.taken += 1
        name = f"s{self.taken}"
        self.machine.guest.control(
            "engine", "snapshot", name=name, created=int(time.time() * 1000))
        self.digests[name] = self._digest(name)

    def delete_one(self):
        """Its space comes back in the background: that goes on when the power is cut."""
        if len(self.digests) > 2:
            name = self.machine.chance.choice(list(self.digests))
            self.machine.guest.control("engine", "delete-snapshot", name=name)
            del self.digests[name]
            self.deleted += 1

    def check(self):
        for name, digest in self.digests.items():
            assert self._digest(name) == digest, f"snapshot {name} is not what it was"

    def _digest(self, name):
        handle, digest = connect(f"{self.machine.uri}@{name}"), hashlib.sha256()
        for offset in range(0, SIZE, MIB):
            digest.update(handle.pread(MIB, offset))
        handle.shutdown()
        return digest.digest()


def cut_power_under_load(context, file_system, rounds):
    prepare()
    history = History(BLOCKS)
    requests = lost = torn = 0
    slowest = 0.0
    with Machine(context.backend, context.seed, file_system) as machine:
        machine.start()
        snapshots = Snapshots(machine)
        for turn in range(rounds):
            client = Workload(
                history, machine.uri, machine.chance.getrandbits(32), flushes=FLUSHES).start()
            client.wait_completed(machine.chance.randrange(100, 700), 300)
            snapshots.take()
            client.wait_completed(machine.chance.randrange(100, 700), 300)
            snapshots.delete_one()
            client.wait_completed(machine.chance.randrange(200), 300)
            machine.cut_power()
            assert client.join(), "the client has not noticed"
            requests += client.completed
            lost += history.cut_power()
            slowest = max(slowest, machine.start(client_lives=turn % 2 == 1))
            torn += check_all_after_cut(history, machine.uri)
            snapshots.check()
        machine.check_copies()
        sectors = sum(disk.lost for disk in machine.disks)
        assert sectors > 0, "no disk has lost anything"
    return (f"{rounds} cuts on {file_system}, {requests} requests, {lost} blocks not flushed, "
            f"{sectors} sectors lost, {torn} blocks torn, {machine.decisions} losses accepted, "
            f"{snapshots.taken} snapshots, {snapshots.deleted} deleted, "
            f"served after {slowest:.1f} s at most")


@once
def test_power_cuts_on_ext4(context):
    return cut_power_under_load(context, "ext4", max(1, context.rounds // 2))


@once
def test_power_cuts_on_xfs(context):
    return cut_power_under_load(context, "xfs", max(1, context.rounds // 4))


class GuestReplica(Replica):
    """A replica on a machine of its own, whose power can be cut."""

    def __init__(self, cluster, number, chance):
        super().__init__(cluster, number, "/run/disk/replica")
        self.chance = chance
        self.disk = LossyDisk(DISK, cluster.path)
        self.guest = None
        self.boot()
        self.guest.run("mkfs.ext4 -q /dev/vda")
        self.mount()

    def boot(self):
        self.guest = Guest(self.cluster.path, [self.disk.uri], {self.port: self.port})

    def mount(self):
        self.guest.run("mkdir -p /run/disk && mount /dev/vda /run/disk")

    def tool(self, verb, *arguments):
        words = " ".join(str(a) for a in arguments)
        return self.guest.run(
            f"{BINARIES}/haptera-replica {verb} --dir {self.directory} {words}").encode()

    def start(self):
        self.guest.run(
            f"HAPTERA_IO={self.cluster.environment['HAPTERA_IO']} setsid "
            f"{BINARIES}/haptera-replica serve --dir {self.directory} --listen 0.0.0.0:{self.port} "
            "--control /run/replica.sock >/run/replica.log 2>&1 &")

    def shutdown(self):
        self.guest.control("replica", "shutdown", check=False)
        self.guest.run("pidwait haptera || true")

    def export_digest(self):
        return self.guest.run(
            f"set -o pipefail; {BINARIES}/haptera-replica export --dir {self.directory} --output - "
            "| sha256sum").split()[0]

    def cut_power(self):
        self.guest.cut_power()
        self.disk.lose(self.chance, self.chance.choice(KEPT))

    def come_back(self):
        self.boot()
        self.mount()
        self.start()


@once
def test_power_cut_of_one_machine(context):
    """Acknowledged writes, flushed or not, are on the others: every one of them stays. In every
    other round the engine dies at the same moment, and the next one must see for itself that the
    member it finds has lost some."""
    prepare()
    chance = random.Random(context.seed)
    with context.cluster(size=SIZE) as cluster:
        away = cluster.replicas[1] = GuestReplica(cluster, 2, chance)
        try:
            cluster.up()
            history = History(BLOCKS)
            load, requests = None, 0
            rounds = max(1, context.rounds // 2)
            for turn in range(rounds):
                if load is None:
                    load = Workload(
                        history, cluster.engine.unix, chance.getrandbits(32),
                        flushes=FLUSHES).start()
                load.wait_completed(chance.randrange(500, 3000), 300)
                away.cut_power()
                if turn % 2:
                    cluster.engine.process.kill()
                    load.join()
                    requests, load = requests + load.completed, None
                    away.come_back()
                    cluster.start_engine()
                    check_all(history, cluster.engine.unix)
                else:
                    load.wait_completed(chance.randrange(500, 3000), 300)
                    away.come_back()
                cluster.wait_healthy()
            if load:
                assert load.stop() is None, "the client got an error"
                requests += load.completed
            check_all(history, cluster.engine.unix)
            cluster.check_copies()
            assert away.disk.lost > 0, "the disk has lost nothing"
        except BaseException:
            if away.guest.is_running:
                print(away.guest.run("cat /run/replica.log", check=False))
            raise
        finally:
            away.guest.cut_power()
            away.disk.close()
    return f"{rounds} cuts, {requests} requests, {away.disk.lost} sectors lost"
