"""A kernel's NBD client and the file systems on it, as nodes attach volumes."""

import time

from harness.cluster import MIB, ROOT, control, wait_for
from harness.context import once
from harness.guest import HOST, Guest

SIZE, GROWN = 384 * MIB, 640 * MIB


class FileSystem:
    def __init__(self, make, grow, snapshot_options, check, attach):
        self.make, self.grow, self.check, self.attach = make, grow, check, attach
        self.snapshot_options = snapshot_options


# By netlink the kernel keeps the connection itself; by ioctl a process of nbd-client does.
EXT4 = FileSystem(
    "mkfs.ext4 -q", "resize2fs /dev/nbd0", "ro", "e2fsck -fn", "nbd-client")
XFS = FileSystem(
    "mkfs.xfs -q", "xfs_growfs /mnt/data", "ro,nouuid", "xfs_repair -n",
    "nbd-client -nonetlink")


def attach(guest, cluster, kind):
    guest.run(f"{kind.attach} -N volume {HOST} {cluster.engine.port} /dev/nbd0")


def write(guest, name, mebibytes):
    """A file of random bytes, synced; its digest."""
    return guest.run(
        f"dd if=/dev/urandom of=/mnt/data/{name} bs=64k count={mebibytes * 16} conv=fsync "
        f"2>/dev/null && sha256sum < /mnt/data/{name}")


def check(guest, files, place="/mnt/data"):
    for name, digest in files.items():
        assert guest.run(f"sha256sum < {place}/{name}") == digest, f"{place}/{name} has changed"


def allocated(cluster):
    return [int(r.status()["allocatedBytes"]) for r in cluster.replicas]


def life_under(kind, context):
    with context.cluster(size=SIZE) as cluster:
        cluster.up()
        with Guest(cluster.path) as guest:
            attach(guest, cluster, kind)
            guest.run(f"{kind.make} /dev/nbd0 && mkdir /mnt/data && mount /dev/nbd0 /mnt/data")
            files = {"first": write(guest, "first", 24)}

            away = cluster.replicas[1]
            away.process.kill()
            files["degraded"] = write(guest, "degraded", 16)
            away.start()
            cluster.engine.wait_state(away, "inSync")

            guest.run("sync -f /mnt/data")
            control(cluster.engine.control, "snapshot", name="before",
                    created=int(time.time() * 1000))
            before = dict(files)
            del files["first"]
            guest.run("rm /mnt/data/first && sync -f /mnt/data")
            files["second"] = write(guest, "second", 16)
            # As `storagectl snapshot mount-info` says it: the journal is replayed, into a file of
            # the guest's. Without a replay XFS did not show what had been synced.
            uri = f"nbd://{HOST}:{cluster.engine.port}/volume@before"
            guest.run(f"qemu-nbd --snapshot --format=raw --connect=/dev/nbd1 '{uri}'")
            guest.run(
                f"mkdir /mnt/before && mount -o {kind.snapshot_options} /dev/nbd1 /mnt/before")
            check(guest, before, "/mnt/before")
            guest.run("umount /mnt/before && qemu-nbd --disconnect /dev/nbd1")
            control(cluster.engine.control, "delete-snapshot", name="before")

            control(cluster.engine.control, "resize", size=GROWN)
            guest.run(f"/usr/bin/python3 {ROOT}/scripts/nbd-grow /dev/nbd0 {GROWN} && {kind.grow}")
            assert int(guest.run("blockdev --getsize64 /dev/nbd0")) == GROWN
            assert int(guest.run("df --output=size -B1 /mnt/data").split()[-1]) > SIZE
            files["large"] = write(guest, "large", 128)

            held = allocated(cluster)
            del files["large"]
            guest.run("rm /mnt/data/large && sync -f /mnt/data && fstrim /mnt/data", 300)
            wait_for(lambda: max(allocated(cluster)) < min(held) - 96 * MIB,
                     f"trimmed space to come back: {held}, {allocated(cluster)}")

            # The machine with the mounted volume dies: what was synced is there.
            guest.run("echo gone > /mnt/data/unsynced")
        with Guest(cluster.path) as guest:
            attach(guest, cluster, kind)
            guest.run("mkdir /mnt/data && mount /dev/nbd0 /mnt/data")
            check(guest, files)
            guest.run(f"umount /mnt/data && {kind.check} /dev/nbd0 && nbd-client -d /dev/nbd0")
        cluster.size = GROWN
        cluster.check_copies()


@once
def test_kernel_ext4(context):
    life_under(EXT4, context)


@once
def test_kernel_xfs(context):
    life_under(XFS, context)
