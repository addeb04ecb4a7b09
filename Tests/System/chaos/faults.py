"""What is done to a volume. Each fault is a generator: it strikes, yields how many seconds to let
it last, and undoes itself. `volume.heal` undoes all of them at once.

One good copy of everything promised survives any mix of them: what harms files (`HARMFUL`) harms
those of one replica, the same until the end of the round, and only while the others are in sync.
Everything else may come in any number, on any process, at any time: it takes nothing away that was
promised.
"""

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess

from . import formats
from .data import BLOCK

HARMED_MAX = 20  # blocks of a layer
LINKS = [("client", "engine"), ("engine", "store")] + [
    ("engine", f"replica{n}") for n in (1, 2, 3)]


def some_replica(volume, source):
    return source.choice(volume.cluster.replicas)


def kill_replica(volume, source, replica=None):
    replica = replica or some_replica(volume, source)
    volume.note(f"kill replica {replica.number}")
    volume.hold(replica)
    yield source.choice((0, 0.5, 3))
    volume.release(replica)


def kill_engine(volume, source):
    volume.note("kill engine")
    volume.kill("engine")
    yield 0


def kill_replicas(volume, source):
    volume.note("kill all replicas")
    for replica in volume.cluster.replicas:
        volume.hold(replica)
    yield source.choice((0, 1))
    for replica in source.sample(volume.cluster.replicas, 3):
        volume.release(replica)
        volume.pass_time(source.choice((0, 0.5)))


def kill_everything(volume, source):
    volume.note("kill everything")
    for target in [*volume.cluster.replicas, "engine"]:
        volume.hold(target)
    yield 0
    for target in source.sample([*volume.cluster.replicas, "engine"], 4):
        volume.release(target)


def pause_replica(volume, source, replica=None):
    replica = replica or some_replica(volume, source)
    seconds = source.choice((0.1, 1, 4.5))
    volume.note(f"stop replica {replica.number} for {seconds} s")
    volume.signal(replica, signal.SIGSTOP)
    yield seconds
    volume.signal(replica, signal.SIGCONT)


def pause_engine(volume, source):
    seconds = source.choice((0.1, 1, 4.5))
    volume.note(f"stop the engine's process for {seconds} s")
    volume.signal("engine", signal.SIGSTOP)
    yield seconds
    volume.signal("engine", signal.SIGCONT)


def crash_client(volume, source):
    volume.note("a client dies")
    volume.crash_worker()
    yield 0


def store_outage(volume, source):
    volume.note("store away")
    volume.cluster.stop_store()
    yield source.choice((0.5, 2, 5))
    if not volume.cluster.store.is_running:
        volume.cluster.start_store()


def reset_connections(volume, source):
    link = source.choice(LINKS)
    volume.note(f"reset {link}")
    volume.network.reset(*link)
    yield 0


def partition(volume, source, link=None, kinds=("both ways", "there", "back")):
    link = link or source.choice(LINKS)
    kind = source.choice(kinds)
    volume.note(f"partition {link} {kind}")
    ways = {"both ways": [link, link[::-1]], "there": [link], "back": [link[::-1]]}[kind]
    for way in ways:
        volume.network.cut(*way)
    yield source.choice((0.5, 2, 5))
    for way in ways:
        volume.network.join(*way)


def partition_one_way(volume, source):
    """Of what the engine needs."""
    yield from partition(volume, source, source.choice(LINKS[1:]), ("there", "back"))


def partition_both_ways(volume, source):
    yield from partition(volume, source, source.choice(LINKS[1:]), ("both ways",))


def flapping(volume, source):
    link = source.choice(LINKS)
    volume.note(f"flapping {link}")
    for _ in range(source.randrange(4, 10)):
        way = source.choice((link, link[::-1]))
        volume.network.cut(*way)
        volume.pass_time(source.uniform(0.05, 0.5))
        volume.network.join(*way)
        volume.pass_time(source.uniform(0, 0.3))
    yield 0


def isolate(volume, source):
    """A replica's host alone, as when its switch dies."""
    host = source.choice(("replica1", "replica2", "replica3", "engine"))
    volume.note(f"isolate {host}")
    ways = [(a, b) for a, b in ((host, o) for o in volume.network.names if o != host)]
    for way in ways:
        volume.network.cut(*way)
        volume.network.cut(*way[::-1])
    yield source.choice((1, 4.5))
    for way in ways:
        volume.network.join(*way)
        volume.network.join(*way[::-1])


def clog(volume, source):
    host = source.choice(("replica1", "replica2", "replica3", "engine", "client"))
    volume.note(f"clog {host}")
    volume.network.clog(host)
    yield source.choice((1, 4))
    volume.network.unclog(host)


def sick_disk(name, rules):
    def fault(volume, source, replica=None):
        replica = replica or some_replica(volume, source)
        rule = source.choice(rules)
        volume.note(f"replica {replica.number} restarts with {rule}")
        restart_with(volume, replica, rule)
        yield source.choice((2, 4))
        restart_with(volume, replica, "")
    fault.__name__ = name
    return fault


def restart_with(volume, replica, rules):
    replica.environment = {"HAPTERA_FAULTS": rules} if rules else {}
    volume.kill(replica)


slow_disk = sick_disk("slow_disk", (
    "write:data:delay=15:every=2", "sync:any:delay=300:every=3", "any:any:delay=5",
    "read:data:delay=60:every=4"))
failing_disk = sick_disk("failing_disk", (
    "write:data:EIO:every=150", "read:data:EIO:every=100", "sync:any:EIO:every=10",
    "sync:any:after-EIO:at=12", "write:table:EIO:every=20", "write:data:short:every=60",
    "write:data:ENOSPC:every=200"))


def throttled_disk(volume, source):
    """The kernel holds a disk's writes back, under a process that goes on."""
    if not volume.limit:
        return
    replica, rate = volume.cluster.replicas[2], source.choice((40, 100, 300))
    volume.note(f"the disk of replica {replica.number} takes {rate} writes a second")
    volume.limit.hold(replica.process)
    volume.limit.set(rate)
    yield source.choice((2, 4, 7))
    volume.limit.lift()


def full_disk(volume, source):
    if not volume.can_fill:
        return
    replica = volume.cluster.replicas[2]
    volume.note(f"the disk of replica {replica.number} is full")
    filler = replica.directory.parent / "filler"
    with open(filler, "wb") as file:
        free = os.statvfs(filler).f_bfree * 4096
        for count in (free - source.choice((0, 1 << 20)), free - (4 << 20)):
            try:
                os.posix_fallocate(file.fileno(), 0, max(count, 4096))
                break
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
    yield source.choice((2, 4))
    filler.unlink(missing_ok=True)


PASSING = [
    kill_replica, kill_engine, kill_replicas, kill_everything, pause_replica, pause_engine,
    crash_client, store_outage, reset_connections, partition, flapping, isolate, clog, slow_disk,
    failing_disk, throttled_disk, full_disk]


# Harmful ones. They begin with all copies in sync.

def victim(volume, source):
    """What is harmed already, so that the other copies stay as good as they are."""
    chosen = some_replica(volume, source)
    return next((r for r in volume.cluster.replicas if r.number in volume.ill), chosen)


def damage(volume, source, change):
    """Rewrites blocks of one running replica behind its back, in any of its layers."""
    volume.converge()
    replica = victim(volume, source)
    volume.ill.add(replica.number)
    done = {}
    for path in formats.layers(replica.directory, "data"):
        # (The layer of a deleted snapshot may be gone by now.)
        with contextlib.suppress(FileNotFoundError):
            done[path.name] = harm_blocks(volume, source, path, change)
    volume.harmed_below += sum(list(done.values())[:-1])
    volume.note(f"blocks of replica {replica.number} damaged: {done}")


def harm_blocks(volume, source, path, change):
    """How many were, of those with data."""
    touched, done = volume.checker.touched(), 0
    source.shuffle(touched)
    with open(path, "r+b") as file:
        for block in touched:
            if done == HARMED_MAX:
                break
            file.seek(block * BLOCK)
            before = file.read(BLOCK)
            if any(before):
                after = change(file, before)
                file.seek(block * BLOCK)
                file.write(after)
                done += 1
        file.flush()
        os.fdatasync(file.fileno())
    return done


def flip_bits(volume, source):
    def change(_, before):
        at = source.randrange(BLOCK)
        return before[:at] + bytes([before[at] ^ 1 << source.randrange(8)]) + before[at + 1:]
    damage(volume, source, change)
    yield 2
    if source.random() < 0.5:
        yield from kill_engine(volume, source)


def misdirected_blocks(volume, source):
    def change(file, before):
        file.seek(source.randrange(volume.size // BLOCK) * BLOCK)
        return file.read(BLOCK)
    damage(volume, source, change)
    yield 2


def take_away(volume, source):
    """A replica down and out of the in-sync set, so that its files no longer count."""
    volume.converge()
    replica = victim(volume, source)
    volume.note(f"replica {replica.number} down")
    volume.hold(replica)
    volume.wait(lambda: not volume.is_member(replica), "the removal of what is down")
    return replica


def lost_directory(volume, source):
    replica = take_away(volume, source)
    volume.note(f"directory of replica {replica.number} deleted")
    volume.make_anew(replica)
    volume.release(replica)
    yield source.choice((0, 0.2, 1))


def truncated_files(volume, source):
    replica = take_away(volume, source)
    volume.ill.add(replica.number)
    files = [f for f in replica.directory.rglob("*") if f.is_file() and f.stat().st_size > 4096]
    file = source.choice(files)
    size = int(file.stat().st_size * source.choice((0, 0.3, 0.9)))
    volume.note(f"{file.name} of replica {replica.number} cut to {size} bytes")
    os.truncate(file, size)
    volume.release(replica)
    yield 1


def old_copy(volume, source):
    replica = take_away(volume, source)
    saved = volume.cluster.path / "old-copy"
    shutil.rmtree(saved, ignore_errors=True)
    subprocess.run(["cp", "-a", "--sparse=always", replica.directory, saved], check=True)
    volume.release(replica)
    volume.converge()
    volume.progress(50)
    volume.note(f"replica {replica.number} down again")
    volume.hold(replica)
    if source.random() < 0.5:
        volume.wait(lambda: not volume.is_member(replica), "the removal of what is down")
    volume.note(f"old copy put in place of replica {replica.number}")
    shutil.rmtree(replica.directory)
    subprocess.run(["cp", "-a", "--sparse=always", saved, replica.directory], check=True)
    shutil.rmtree(saved)
    volume.release(replica)
    yield 1


def put_down(volume, source):
    """A replica down, and as likely as not out of the in-sync set."""
    if source.random() < 0.5:
        return take_away(volume, source)
    volume.converge()
    replica = victim(volume, source)
    volume.note(f"replica {replica.number} down for a moment")
    volume.hold(replica)
    return replica


def harm_metadata(name, harm):
    """No other copy repairs it: the replica ends when it is met, and is made anew."""
    def fault(volume, source):
        replica = put_down(volume, source)
        volume.ill.add(replica.number)
        volume.incurable.add(replica.number)
        volume.note(f"replica {replica.number}: {harm(replica.directory, source)}")
        volume.release(replica)
        yield source.choice((1, 3))
    fault.__name__ = name
    return fault


harmed_tables = harm_metadata("harmed_tables", formats.harm_tables)
harmed_log = harm_metadata("harmed_log", formats.harm_log)

HARMFUL = [flip_bits, misdirected_blocks, lost_directory, truncated_files, old_copy,
           harmed_tables, harmed_log]


def strike(volume, fault, seed, *arguments):
    """One fault from its beginning to its end, with the clients at work."""
    source = random.Random(seed)
    for seconds in fault(volume, source, *arguments):
        volume.pass_time(seconds)


def strike_many(volume, faults, seed):
    """All of them, begun one soon after the other, so that they overlap."""
    source, under_way = random.Random(seed), []
    for fault in faults:
        running = fault(volume, random.Random(source.getrandbits(32)))
        if (seconds := next(running, None)) is not None:
            under_way.append((seconds, running))
        volume.pass_time(source.choice((0, 0.05, 0.3, 1)))
    source.shuffle(under_way)
    for seconds, running in under_way:
        volume.pass_time(min(seconds, 2))
        for more in running:
            volume.pass_time(more)
