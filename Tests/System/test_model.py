"""The whole life of a volume at random, against a model that is exact to the byte."""

import random
import shutil
import subprocess
import time

import nbd

import test_sizes
from harness.cluster import BINARIES, MIB, control, wait_for
from harness.workload import BLOCK

ZERO = bytes(BLOCK)
SMALLEST, LARGEST = 16 * MIB, 40 * MIB
SNAPSHOTS_MAX = 12
CLONES_MAX = 4


class Model:
    """A volume and its snapshots as lists of blocks, and the real ones beside it."""

    def __init__(self, cluster, chance):
        self.cluster, self.chance = cluster, chance
        self.blocks = [ZERO] * (SMALLEST // BLOCK)
        self.snapshots = {}
        self.clones = []  # (directories, blocks)
        self.counts = {}
        self.serial = 0
        self.generation = 1
        self.scrubs = 0
        self.client = None
        self.connect()

    # The client

    def connect(self):
        if self.client is None:
            self.client = nbd.NBD()
            self.client.set_export_name("volume")
            self.client.connect_unix(str(self.cluster.engine.unix))

    def disconnect(self):
        if self.client is not None:
            self.client.shutdown()
            self.client = None
        wait_for(
            lambda: self.cluster.engine.status()["connections"] == "0", "the client to be gone")

    def place(self, most):
        """Mostly where others were, so that layers cover each other; often across regions."""
        count = self.chance.randrange(1, most + 1)
        if self.chance.random() < 0.7:
            at = self.chance.choice((0, 200, 250, 1000, 2040))
            first = min(at + self.chance.randrange(60), len(self.blocks) - count)
        else:
            first = self.chance.randrange(len(self.blocks) - count + 1)
        return first, count

    def write(self):
        first, count = self.place(24)
        if self.chance.random() < 0.3:  # a part of a block or two
            offset = first * BLOCK + self.chance.randrange(BLOCK // 512) * 512
            data = self.chance.randbytes(512 * self.chance.randrange(1, 8))
            data = data[:len(self.blocks) * BLOCK - offset]
            self.client.pwrite(data, offset)
            end = (offset + len(data) + BLOCK - 1) // BLOCK
            joined = bytearray(b"".join(self.blocks[first:end]))
            joined[offset - first * BLOCK:offset - first * BLOCK + len(data)] = data
            for index in range(first, end):
                self.blocks[index] = bytes(
                    joined[(index - first) * BLOCK:(index - first + 1) * BLOCK])
            return
        data = self.chance.randbytes(count * BLOCK)
        self.client.pwrite(
            data, first * BLOCK, nbd.CMD_FLAG_FUA if self.chance.random() < 0.1 else 0)
        for index in range(count):
            self.blocks[first + index] = data[index * BLOCK:(index + 1) * BLOCK]

    def trim(self):
        first, count = self.place(300)
        if self.chance.random() < 0.5:
            self.client.trim(count * BLOCK, first * BLOCK)
        else:
            self.client.zero(count * BLOCK, first * BLOCK)
        self.blocks[first:first + count] = [ZERO] * count

    def read(self):
        first, count = self.place(200)
        found = self.client.pread(count * BLOCK, first * BLOCK)
        assert found == b"".join(self.blocks[first:first + count]), f"blocks {first}+{count}"

    def flush(self):
        self.client.flush()

    # The administrator

    def control(self, verb, **arguments):
        return control(self.cluster.engine.control, verb, **arguments)

    def name(self, kind):
        self.serial += 1
        return f"{kind}-{self.serial}"

    def snapshot(self):
        if len(self.snapshots) >= SNAPSHOTS_MAX:
            return self.delete()
        name = self.name("s")
        self.control("snapshot", name=name, created=int(time.time() * 1000))
        self.snapshots[name] = list(self.blocks)

    def delete(self):
        if self.snapshots:
            name = self.chance.choice(list(self.snapshots))
            self.control("delete-snapshot", name=name)
            del self.snapshots[name]

    def revert(self):
        if not self.snapshots or len(self.snapshots) >= SNAPSHOTS_MAX:
            return self.snapshot()
        self.disconnect()
        name, keep = self.chance.choice(list(self.snapshots)), self.name("kept")
        self.control("revert", snapshot=name, keep=keep, created=int(time.time() * 1000))
        self.snapshots[keep] = self.blocks
        # The volume keeps its size.
        back = self.snapshots[name]
        self.blocks = back + [ZERO] * (len(self.blocks) - len(back))
        self.connect()

    def resize(self):
        room = LARGEST // BLOCK - len(self.blocks)
        if room > 0:
            more = min(room, self.chance.choice((1, 7, 256, 300, 700)))
            size = (len(self.blocks) + more) * BLOCK
            self.control("resize", size=size)
            self.cluster.size = size
            self.blocks = self.blocks + [ZERO] * more
            # Who is connected knows the old size.
            self.disconnect()
            self.connect()

    def look(self):
        """Reads a part of a snapshot."""
        if not self.snapshots:
            return
        name = self.chance.choice(list(self.snapshots))
        expected = self.snapshots[name]
        handle = nbd.NBD()
        handle.set_export_name(f"volume@{name}")
        handle.connect_unix(str(self.cluster.engine.unix))
        assert handle.get_size() == len(expected) * BLOCK, name
        count = min(500, len(expected))
        first = self.chance.randrange(len(expected) - count + 1)
        found = handle.pread(count * BLOCK, first * BLOCK)
        assert found == b"".join(expected[first:first + count]), f"{name}: blocks {first}+{count}"
        handle.shutdown()
        wait_for(
            lambda: self.cluster.engine.status()["snapshotReaders"] == "0", "the reader to be gone")

    def scrub(self):
        self.cluster.start_replicas()
        self.cluster.wait_healthy()
        self.scrubs += 1
        self.control("scrub", **{"from": f"{self.scrubs}:0:0:0:0:0:0"})

        def is_done():
            status = self.cluster.engine.status()
            return (status["scrub.state"] == "finished"
                    and status["scrub"].startswith(f"{self.scrubs}:"))

        wait_for(is_done, "the scrub's end", 120)
        found = self.cluster.engine.status()["scrub"].split(":")
        assert found[3] == found[5] == found[6] == "0", f"a scrub found bad blocks: {found}"

    def clone(self):
        """Of a snapshot, on every replica; or the oldest one goes. None is served: each is a copy
        that must stay what it was made as, whatever becomes of the volume."""
        if len(self.clones) >= CLONES_MAX or not self.snapshots:
            if self.clones:
                self.drop_clone()
            return
        self.cluster.start_replicas()
        self.cluster.wait_healthy()
        _, _, name = self.chance.choice(self.cluster.record().snapshots)
        blocks = self.snapshots[name]
        directories = []
        for replica in self.cluster.replicas:
            directories.append(test_sizes.clone(
                self.cluster, replica, name, folder=self.name("clone-"),
                volume=self.chance.randbytes(16), size=len(blocks) * BLOCK))
        self.clones.append((directories, blocks))

    def drop_clone(self):
        directories, blocks = self.clones.pop(0)
        for directory in directories:
            self.compare_files(directory, None, blocks, f"the clone {directory.name}")
            shutil.rmtree(directory)

    # What fails

    def kill_replica(self):
        self.cluster.start_replicas()
        self.cluster.wait_healthy()
        victim = self.chance.choice(self.cluster.replicas)
        victim.process.kill()
        if self.chance.random() < 0.5:
            victim.start()

    def start_replicas(self):
        self.cluster.start_replicas()

    def kill_engine(self):
        self.client = None
        self.cluster.start_replicas()
        self.cluster.engine.process.kill()
        self.generation += 1
        self.cluster.start_engine(client_generation=self.generation)
        self.connect()

    def detach(self):
        """Everything in order, and again."""
        self.disconnect()
        self.cluster.start_replicas()
        self.cluster.engine.detach()
        if self.chance.random() < 0.5:
            for replica in self.cluster.replicas:
                replica.shutdown()
        self.cluster.start_replicas()
        self.generation += 1
        self.cluster.start_engine(client_generation=self.generation)
        self.connect()

    WEIGHTS = (
        (write, 500), (trim, 90), (read, 150), (flush, 30), (look, 60), (snapshot, 60),
        (delete, 50), (revert, 20), (resize, 6), (scrub, 3), (kill_replica, 6),
        (start_replicas, 12), (kill_engine, 6), (detach, 3), (clone, 10))

    def act(self):
        actions, weights = zip(*self.WEIGHTS)
        action = self.chance.choices(actions, weights)[0]
        name = action.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        action(self)

    # The end

    def finish(self):
        self.start_replicas()
        self.cluster.wait_healthy()
        self.scrub()
        self.disconnect()
        while self.clones:
            self.drop_clone()
        self.give_back()
        left = len(self.cluster.record().layers)
        for replica in self.cluster.replicas:
            wait_for(
                lambda: replica.status()["retiredLayers"] == "0",
                f"replica {replica.number} to be done with deleted layers", 120)
            assert replica.lasting_layers == left, replica.status()
        self.cluster.check_copies()
        for replica in self.cluster.replicas:
            self.compare(replica, None, self.blocks)
            for name, blocks in self.snapshots.items():
                self.compare(replica, name, blocks)

    def give_back(self):
        """What deletions give back, one after the other, is what was said before."""
        given = []
        for name in self.chance.sample(sorted(self.snapshots), min(3, len(self.snapshots))):
            predicted = {
                replica.number: test_sizes.predictions(self.cluster, replica)
                for replica in self.cluster.replicas}
            given.append(test_sizes.delete_as_predicted(
                self.cluster, name, predicted, was_killed=True))
            del self.snapshots[name]
        self.counts["KiB given back as predicted"] = sum(given) // 1024

    def compare(self, replica, snapshot, blocks):
        self.compare_files(
            replica.directory, snapshot, blocks,
            f"{snapshot or 'the volume'} on replica {replica.number}")

    def compare_files(self, directory, snapshot, blocks, what):
        which = ["--snapshot", snapshot] if snapshot else []
        image = subprocess.run(
            [BINARIES / "haptera-replica", "export", "--dir", directory, *which,
             "--output", "-"], check=True, stdout=subprocess.PIPE).stdout
        if image == b"".join(blocks):
            return
        assert len(image) == len(blocks) * BLOCK, f"{what}: {len(image)} bytes"
        wrong = [index for index, block in enumerate(blocks)
                 if image[index * BLOCK:(index + 1) * BLOCK] != block]
        raise AssertionError(
            f"{what} is not what the model says "
            f"in {len(wrong)} blocks, the first {wrong[:8]}")


def test_the_life_of_a_volume(context):
    """Writes, trims, snapshots, deletions, reverts, clones, growth, scrubs, kills and detaches; each
    clone is compared in full on every replica before it is deleted, and so are in the end the
    volume and every snapshot. 250 operations a round: `--rounds 40` is the long version."""
    with context.cluster(size=SMALLEST) as cluster:
        cluster.up()
        model = Model(cluster, random.Random(context.seed))
        for number in range(250 * context.rounds):
            try:
                model.act()
            except (AssertionError, OSError, nbd.Error) as error:
                raise AssertionError(
                    f"operation {number} of seed {context.seed}: {error}") from error
        model.finish()
        counts = ", ".join(f"{count} {name}" for name, count in sorted(model.counts.items()))
        return f"{250 * context.rounds} operations ({counts}), {len(model.snapshots)} snapshots left"
