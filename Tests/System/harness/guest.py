"""A machine with a kernel and a power switch of its own: Debian's kernel in QEMU, by emulation.

Its root is this machine's, read-only, with an empty /run; its disks are what the test gives it. It
is slow: good for what happens, not for how fast.
"""

import json
import os
import pathlib
import platform
import shlex
import shutil
import socket
import subprocess
import tempfile

from .cluster import ROOT, Process
from .context import SkipTest

HOST = "10.0.2.2"  # this machine's loopback, as the guest sees it
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "9pnet_virtio", "9p", "ext4", "xfs", "nbd")
NEEDED = ("qemu-system-x86_64", "busybox", "depmod", "modprobe", "mkfs.xfs", "nbd-client")
_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"

_INIT = """#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
while read -r module; do $b insmod /modules/$module; done < /modules/order
$b mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose root /root
$b mount -t tmpfs tmpfs /root/run
$b mkdir /root/run/lock
$b mount -t devtmpfs dev /root/dev
$b mount --move /proc /root/proc
$b mount --move /sys /root/sys
$b ip link set lo up
$b ip link set eth0 up
$b ip addr add 10.0.2.15/24 dev eth0
$b ip route add default via 10.0.2.2
$b cp /agent /root/run/agent
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/run TMPDIR=/run
$b chroot /root /usr/bin/python3 /run/agent $($b cat /root/proc/cmdline)
$b poweroff -f
"""

# Runs what it is told, one command after the other, and says how each went.
_AGENT = """
import json, socket, subprocess, sys
port = next(int(w.split("=")[1]) for w in sys.argv if w.startswith("agent="))
with socket.create_connection(("10.0.2.2", port)) as link, link.makefile("rw") as lines:
    for line in lines:
        done = subprocess.run(
            ["bash", "-c", json.loads(line)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", check=False)
        lines.write(json.dumps([done.returncode, done.stdout]) + "\\n")
        lines.flush()
"""


_CONTROL = """
import json, sys
from harness.cluster import control
print(json.dumps(control(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))))
"""


def _tool(name):
    return shutil.which(name, path=_PATH)


def _call(*arguments, **options):
    done = subprocess.run(
        [str(a) for a in arguments], capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": _PATH}, **options)
    if done.returncode:
        raise AssertionError(f"{arguments[0]}: exit {done.returncode}: {done.stderr}")
    return done.stdout


def _archive(out, entries):
    """A cpio archive of (path, mode, content), as the kernel unpacks it (newc)."""
    for number, (path, mode, content) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        name = path.encode() + b"\0"
        fields = [number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0]
        out.write(b"070701" + b"".join(b"%08X" % f for f in fields) + name)
        out.write(bytes(-(110 + len(name)) % 4) + content + bytes(-len(content) % 4))


def prepare():
    """The kernel and what it starts with, made once: a directory. Needs Debian's packages."""
    if platform.machine() != "x86_64":
        raise SkipTest("the guest is an x86_64 machine")
    missing = [name for name in NEEDED if not _tool(name)]
    if missing:
        raise SkipTest(f"no {', '.join(missing)} here; scripts/setup guest installs it")
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    place = pathlib.Path(base) / "haptera-guest"
    place.mkdir(parents=True, exist_ok=True)
    if not (place / "kernel").exists():
        packages = _call("apt-cache", "depends", "linux-image-amd64").split()
        name = next((p for p in packages if p.startswith("linux-image-")
                     and p != "linux-image-amd64"), None)
        if not name:
            raise SkipTest("no package linux-image-amd64 here")
        with tempfile.TemporaryDirectory(dir=place) as scratch:
            try:
                _call("apt-get", "download", "-q", name, cwd=scratch)
            except AssertionError as error:
                raise SkipTest(f"no kernel to be had: {error}") from error
            package = next(pathlib.Path(scratch).glob("*.deb"))
            _call("dpkg-deb", "-x", package, scratch)
            version = next(pathlib.Path(scratch, "lib/modules").iterdir()).name
            _call("depmod", "-b", scratch, version)
            shutil.rmtree(place / "modules", ignore_errors=True)
            (place / "modules").mkdir()
            order = []
            for module in MODULES:
                # "insmod PATH", in the order in which they must be loaded
                for line in _call("modprobe", "-d", scratch, "-S", version, "--show-depends",
                                  module).splitlines():
                    path = pathlib.Path(line.split()[1]) if line.startswith("insmod") else None
                    if path and path.name not in order:
                        order.append(path.name)
                        shutil.copy(path, place / "modules")
            (place / "modules" / "order").write_text("".join(f"{name}\n" for name in order))
            # Last: it says that the rest is there.
            os.rename(pathlib.Path(scratch, f"boot/vmlinuz-{version}"), place / "kernel")
    return place


def _write_start(place, path):
    directory, program, file = 0o40755, 0o100755, 0o100644
    entries = [(name, directory, b"") for name in
               ("bin", "dev", "proc", "sys", "root", "modules")]
    entries.append(("bin/busybox", program, pathlib.Path(_tool("busybox")).read_bytes()))
    entries.append(("init", program, _INIT.encode()))
    entries.append(("agent", file, _AGENT.encode()))
    entries += [(f"modules/{f.name}", file, f.read_bytes())
                for f in sorted((place / "modules").iterdir())]
    with open(path, "wb") as out:
        _archive(out, entries)


class Guest:
    """`disks`: NBD addresses or files, /dev/vda and so on. `ports`: {here: in the guest}."""

    def __init__(self, path, disks=(), ports=(), memory_mib=768):
        place = prepare()
        self.console = path / "console.log"
        start = path / "initramfs"
        _write_start(place, start)
        listener = socket.create_server(("127.0.0.1", 0))
        forwards = "".join(
            f",hostfwd=tcp:127.0.0.1:{here}-:{there}" for here, there in dict(ports).items())
        command = [
            _tool("qemu-system-x86_64"), "-accel", "tcg,thread=multi", "-cpu", "max",
            "-machine", "q35,hpet=off", "-smp", "2", "-m", str(memory_mib), "-nodefaults",
            "-no-user-config", "-no-reboot", "-display", "none", "-serial", f"file:{self.console}",
            "-kernel", place / "kernel", "-initrd", start, "-append",
            "console=ttyS0 quiet panic=-1 mitigations=off nokaslr random.trust_cpu=on tsc=reliable "
            f"agent={listener.getsockname()[1]}",
            "-netdev", f"user,id=net,ipv6=off{forwards}",
            "-device", "virtio-net-pci,netdev=net,romfile=", "-device", "virtio-rng-pci",
            "-virtfs", "local,path=/,mount_tag=root,security_model=none,readonly=on,"
                       "multidevs=remap"]
        for number, disk in enumerate(disks):
            command += [
                "-drive", f"file={disk},if=none,id=d{number},format=raw,cache=none,aio=threads",
                "-device", f"virtio-blk-pci,drive=d{number}"]
        self._qemu = Process("guest", command, path / "qemu.log")
        self._link = None
        try:
            with listener:
                self._link = self._accept(listener)
        except BaseException:
            self.cut_power()
            raise
        self._lines = self._link.makefile("rw")

    def _accept(self, listener):
        """The guest's connection, when it has started."""
        listener.settimeout(1)
        for _ in range(180):
            try:
                return listener.accept()[0]
            except TimeoutError:
                assert self._qemu.is_running, f"no guest: {self._qemu.log.read_text()[-2000:]}"
        raise AssertionError(f"the guest does not start: {self.console_text()}")

    @property
    def is_running(self):
        return self._link is not None

    def console_text(self):
        return self.console.read_text(errors="replace")[-2000:]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.cut_power()

    def run(self, command, timeout=120.0, check=True):
        """What the command prints; it fails as the command does."""
        self._link.settimeout(timeout)
        self._lines.write(json.dumps(command) + "\n")
        self._lines.flush()
        line = self._lines.readline()
        if not line:
            raise AssertionError(f"the guest died of: {command}\n{self.console_text()}")
        status, output = json.loads(line)
        if check and status:
            raise AssertionError(f"in the guest: {command}: exit {status}: {output}")
        return output

    def control(self, process, verb, check=True, **arguments):
        """`cluster.control` in the guest, of the process whose socket is /run/PROCESS.sock. Without
        `check`: it may hang up before its reply arrives."""
        text = self.run(
            f"PYTHONPATH={ROOT}/Tests/System timeout 60 python3 -Bc {shlex.quote(_CONTROL)} "
            f"/run/{process}.sock {verb} {shlex.quote(json.dumps(arguments))}", check=check)
        return json.loads(text) if check else None

    def cut_power(self):
        """At once: what its disks hold is all that is left."""
        self._qemu.kill()
        if self._link:
            self._link.close()
            self._link = None
