"""A kernel's NBD client and the file systems on it, as nodes attach volumes."""

import time

from harness.cluster import MIB, ROOT, control, wait_for
from harness.context import once
from harness.guest import HOST, Guest, prepare
from test_snapshots import take

SIZE, GROWN = 384 * MIB, 640 * MIB
TOOL = f"/usr/bin/python3 {ROOT}/scripts/nbd-device"


class FileSystem:
    def __init__(self, make, grow, snapshot_options, check, outlives):
        self.make, self.grow, self.check, self.outlives = make, grow, check, outlives
        self.snapshot_options = snapshot_options


# One is attached by our tool, which outlives engines; the other by nbd-client, with ioctls.
# XFS cannot replay its log over a growth that is in the log alone: a machine that died soon after
# it grew could not mount any more ("daddr out of range", then "Structure needs cleaning"; the same
# on a plain disk without us). A freeze writes the growth itself to the disk.
EXT4 = FileSystem("mkfs.ext4 -q", "resize2fs /dev/nbd0", "ro", "e2fsck -fn", True)
XFS = FileSystem("mkfs.xfs -q", "xfs_growfs /run/data && xfs_freeze -f /run/data && "
          "xfs_freeze -u /run/data", "ro,nouuid", "xfs_repair -n", False)


def attach(guest, cluster, kind):
    if not kind.outlives:
        guest.run(f"nbd-client -nonetlink -N volume {HOST} {cluster.engine.port} /dev/nbd0")
        return
    guest.run(f"setsid {TOOL} attach /dev/nbd0 nbd://{HOST}:{cluster.engine.port}/volume "
              ">/run/attach.log 2>&1 &")
    wait_for(lambda: "is /dev/nbd0" in attach_log(guest), "the device to be attached")


def attach_log(guest):
    """What the tool has said so far; it must be running."""
    return guest.run("cat /run/attach.log && pgrep -f 'nbd-device attach' >/dev/null")


def detach(guest, kind):
    guest.run(f"{TOOL} detach /dev/nbd0" if kind.outlives else "nbd-client -d /dev/nbd0")


def lose_the_engine(guest, cluster):
    """Killed in the middle of a file, and started again when the kernel holds requests. The file's
    digest, and how long after it was served again the device had a connection."""
    guest.run("setsid bash -c 'dd if=/dev/urandom of=/run/data/over bs=64k count=400 oflag=sync "
              "2>/dev/null && touch /run/written' >/run/dd.log 2>&1 &")
    wait_for(lambda: int(guest.run("stat -c %s /run/data/over || echo 0").split()[-1]) > MIB,
             "the file to grow")
    cluster.engine.process.kill()
    wait_for(lambda: "Dead connection" in guest.run("dmesg"), "a request to find no connection")
    cluster.start_engine(before=cluster.engine)
    served = time.monotonic()
    wait_for(lambda: "new connections" in attach_log(guest), "the kernel to have new connections")
    taken = time.monotonic() - served
    wait_for(lambda: guest.run("ls /run/written", check=False).startswith("/run/written\n"),
             "the file to be written", 300)
    errors = guest.run("dmesg | grep -i 'i/o error' || true")
    assert not errors, errors
    return guest.run("echo 3 > /proc/sys/vm/drop_caches; sha256sum < /run/data/over"), taken


def write(guest, name, mebibytes):
    """A file of random bytes, synced; its digest."""
    return guest.run(
        f"dd if=/dev/urandom of=/run/data/{name} bs=64k count={mebibytes * 16} conv=fsync "
        f"2>/dev/null && sha256sum < /run/data/{name}")


def check(guest, files, place="/run/data"):
    for name, digest in files.items():
        assert guest.run(f"sha256sum < {place}/{name}") == digest, f"{place}/{name} has changed"


def allocated(cluster):
    return [int(r.status()["allocatedBytes"]) for r in cluster.replicas]


def life_under(kind, context):
    prepare()
    measured = None
    with context.cluster(size=SIZE) as cluster:
        cluster.up()
        with Guest(cluster.path) as guest:
            attach(guest, cluster, kind)
            guest.run(f"{kind.make} /dev/nbd0 && mkdir /run/data && mount /dev/nbd0 /run/data")
            files = {"first": write(guest, "first", 24)}

            away = cluster.replicas[1]
            away.process.kill()
            files["degraded"] = write(guest, "degraded", 16)
            away.start()
            cluster.engine.wait_state(away, "inSync")

            if kind.outlives:
                files["over"], taken = lose_the_engine(guest, cluster)
                measured = f"connected {taken:.1f} s after the engine was served again, or sooner"

            guest.run("sync -f /run/data")
            take(cluster, "before")
            before = dict(files)
            del files["first"]
            guest.run("rm /run/data/first && sync -f /run/data")
            files["second"] = write(guest, "second", 16)
            # As `storagectl snapshot mount-info` says it: the journal is replayed, into a file of
            # the guest's. Without a replay XFS did not show what had been synced.
            uri = f"nbd://{HOST}:{cluster.engine.port}/volume@before"
            guest.run(f"qemu-nbd --snapshot --format=raw --connect=/dev/nbd1 '{uri}'")
            guest.run(
                f"mkdir /run/before && mount -o {kind.snapshot_options} /dev/nbd1 /run/before")
            check(guest, before, "/run/before")
            guest.run("umount /run/before && qemu-nbd --disconnect /dev/nbd1")
            wait_for(lambda: cluster.engine.status()["connections"] == "1", "its reader to leave")
            control(cluster.engine.control, "delete-snapshot", name="before")

            control(cluster.engine.control, "resize", size=GROWN)
            guest.run(f"{TOOL} grow /dev/nbd0 {GROWN} && {kind.grow}")
            assert int(guest.run("blockdev --getsize64 /dev/nbd0")) == GROWN
            assert int(guest.run("df --output=size -B1 /run/data").split()[-1]) > SIZE
            files["large"] = write(guest, "large", 128)

            held = allocated(cluster)
            del files["large"]
            guest.run("rm /run/data/large && sync -f /run/data && fstrim /run/data", 300)
            wait_for(lambda: max(allocated(cluster)) < min(held) - 96 * MIB,
                     f"trimmed space to come back: {held}, {allocated(cluster)}")

            # The machine with the mounted volume dies: what was synced is there.
            guest.run("echo gone > /run/data/unsynced")
        with Guest(cluster.path) as guest:
            attach(guest, cluster, kind)
            guest.run("mkdir /run/data && mount /dev/nbd0 /run/data || { dmesg | tail -40; exit 1; }")
            check(guest, files)
            guest.run(f"umount /run/data && {kind.check} /dev/nbd0")
            detach(guest, kind)
        cluster.size = GROWN
        cluster.check_copies()
    return measured


@once
def test_kernel_ext4(context):
    return life_under(EXT4, context)


@once
def test_kernel_xfs(context):
    return life_under(XFS, context)
