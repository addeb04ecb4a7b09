"""Every process on a host of its own: network namespaces around one router.

The router drops silently, one direction at a time, as a broken switch does: neither side is told.
"""

import contextlib
import ctypes
import os
import random
import socket
import subprocess
import threading

from harness.context import SkipTest

_NEW_NETWORK = 0x40000000


def _run(*words):
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"{' '.join(map(str, words))}: {done.stderr.strip()}")
    return done.stdout


class Network:
    """`hosts` by name; `address(host)`, `enter(host)` for processes, `inside(host)` for threads."""

    def __init__(self, hosts):
        self.names = {host: number + 1 for number, host in enumerate(hosts)}
        self.prefix = f"hpt{random.SystemRandom().getrandbits(32):08x}"
        self.cuts = set()  # (from, to)
        self.clogged = set()
        self._lock = threading.Lock()

    def __enter__(self):
        try:
            _run("ip", "netns", "add", self._space("router"))
        except (OSError, FileNotFoundError) as error:
            raise SkipTest(f"no network namespaces here: {error}") from None
        try:
            _run(*self.enter("router"), "sysctl", "-qw", "net.ipv4.ip_forward=1")
            for host, number in self.names.items():
                self._add(host, number)
        except OSError as error:
            self.__exit__()
            raise SkipTest(f"no network of namespaces here: {error}") from None
        return self

    def _add(self, host, number):
        space, router, port = self._space(host), self._space("router"), f"port{number}"
        _run("ip", "netns", "add", space)
        _run("ip", "link", "add", "eth0", "netns", space, "type", "veth",
             "peer", "name", port, "netns", router)
        for where, device, address in (
                (space, "eth0", self.address(host)), (router, port, f"10.99.{number}.1")):
            _run("ip", "-n", where, "addr", "add", f"{address}/30", "dev", device)
            _run("ip", "-n", where, "link", "set", device, "up")
        _run("ip", "-n", space, "link", "set", "lo", "up")
        _run("ip", "-n", space, "route", "add", "default", "via", f"10.99.{number}.1")

    def __exit__(self, *_):
        for host in [*self.names, "router"]:
            subprocess.run(["ip", "netns", "del", self._space(host)], capture_output=True)

    def _space(self, host):
        return f"{self.prefix}-{host}"

    def address(self, host):
        return f"10.99.{self.names[host]}.2"

    def enter(self, host):
        """What to put before a command so that it runs on that host."""
        return ["nsenter", f"--net=/var/run/netns/{self._space(host)}"]

    @contextlib.contextmanager
    def inside(self, host):
        """Sockets this thread makes meanwhile are that host's."""
        libc = ctypes.CDLL(None, use_errno=True)

        def enter(path):
            with open(path, "rb") as file:
                if libc.setns(file.fileno(), _NEW_NETWORK) != 0:
                    raise OSError(ctypes.get_errno(), f"setns {path}")

        before = os.open(f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY)
        try:
            enter(f"/var/run/netns/{self._space(host)}")
            yield
            enter(f"/proc/self/fd/{before}")
        finally:
            os.close(before)

    def cut(self, source, target):
        """Nothing from `source` reaches `target` any more."""
        with self._lock:
            if (source, target) not in self.cuts:
                self.cuts.add((source, target))
                self._rule("add", source, target)

    def join(self, source, target):
        with self._lock:
            if (source, target) in self.cuts:
                self.cuts.discard((source, target))
                self._rule("del", source, target)

    def _rule(self, verb, source, target):
        _run("ip", "-n", self._space("router"), "rule", verb, "from", self.address(source),
             "to", self.address(target), "blackhole")

    def clog(self, host):
        """What is sent to `host` trickles: 2 Mbit/s behind a long queue."""
        self.clogged.add(host)
        _run("tc", "-n", self._space("router"), "qdisc", "replace", "dev",
             f"port{self.names[host]}", "root", "tbf", "rate", "2mbit", "burst", "32k",
             "latency", "2s")

    def unclog(self, host):
        if host in self.clogged:
            self.clogged.discard(host)
            _run("tc", "-n", self._space("router"), "qdisc", "del", "dev",
                 f"port{self.names[host]}", "root")

    def reset(self, host, other):
        """Breaks every connection between two hosts, both sides at once."""
        for here, there in ((host, other), (other, host)):
            subprocess.run(
                [*self.enter(here), "ss", "-K", "dst", self.address(there)],
                capture_output=True, check=True)

    def heal(self):
        for source, target in list(self.cuts):
            self.join(source, target)
        for host in list(self.clogged):
            self.unclog(host)


def abort(descriptor):
    """Lets the next close of this connection throw away what was not sent yet."""
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
