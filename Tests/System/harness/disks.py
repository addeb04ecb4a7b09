"""Disks of their own, on loop devices: some that fill up, some that can be made slow."""

import fcntl
import os
import pathlib
import shutil
import struct
import subprocess

from .cluster import wait_for
from .context import SkipTest

EXT4_IOC_SHUTDOWN = 0x8004587D
NO_LOG_FLUSH = 2
GROUPS = pathlib.Path("/sys/fs/cgroup")


class SmallFileSystem:
    """A loop-mounted ext4 of its own, which can be filled without harm."""

    def __init__(self, directory, size):
        self.image, self.mount = directory / "small.img", directory / "small"
        self.size = size

    def __enter__(self):
        self.mount.mkdir()
        with open(self.image, "wb") as file:
            file.truncate(self.size)
        subprocess.run(["mkfs.ext4", "-q", "-b", "4096", self.image], check=True)
        done = self._mount()
        if done.returncode != 0:
            raise SkipTest(f"cannot mount a loop device: {done.stderr.strip()}")
        return pathlib.Path(self.mount)

    def _mount(self):
        return subprocess.run(
            ["mount", "-o", "loop", self.image, self.mount], capture_output=True, text=True)

    def shut_down(self):
        """As ext4 does after an error it cannot go on with: from now on everything fails with EIO,
        and what was not on the disk never gets there."""
        fd = os.open(self.mount, os.O_RDONLY)
        fcntl.ioctl(fd, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        os.close(fd)

    def mount_again(self):
        """Its users have ended; what they had open the kernel may close a little later."""
        wait_for(
            lambda: subprocess.run(["umount", self.mount], capture_output=True).returncode == 0,
            "the file system to be free")
        done = self._mount()
        assert done.returncode == 0, done.stderr

    def __exit__(self, *_):
        subprocess.run(["umount", "-l", self.mount], check=False)
        shutil.rmtree(self.mount, ignore_errors=True)


class WriteLimit:
    """How many writes a second the kernel lets a process make to the disk that `path` is on.

    By the control group's block I/O controller, of version 1 or 2: the disk itself becomes slow,
    and quick again, under a process that goes on.
    """

    def __init__(self, path):
        self.device = subprocess.run(
            ["mountpoint", "-d", path], check=True, capture_output=True, text=True).stdout.strip()
        is_old = (GROUPS / "blkio").is_dir()
        self.group = (GROUPS / "blkio" if is_old else GROUPS) / f"haptera-{self.device}"
        self.file = self.group / ("blkio.throttle.write_iops_device" if is_old else "io.max")
        self.form, self.unlimited = ("{} {}", "0") if is_old else ("{} wiops={}", "max")

    def __enter__(self):
        try:
            self.group.mkdir()
            self.lift()
        except OSError as error:
            self.__exit__()
            raise SkipTest(f"cannot limit a disk's writes: {error}") from None
        return self

    def __exit__(self, *_):
        if self.group.is_dir():
            for pid in (self.group / "cgroup.procs").read_text().split():
                (self.group.parent / "cgroup.procs").write_text(pid)
            self.group.rmdir()

    def hold(self, process):
        (self.group / "cgroup.procs").write_text(str(process.pid))

    def set(self, writes_per_second):
        self.file.write_text(self.form.format(self.device, writes_per_second))

    def lift(self):
        self.set(self.unlimited)
