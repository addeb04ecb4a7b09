"""The whole control plane as real processes: controller, node agents, storagectl."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import tempfile

from .cluster import BINARIES, CONTROL_BINARIES, wait_for
from .context import SkipTest


class Plane:
    """A cluster on this host. Skips the test where only the data plane was built."""

    def __init__(self, context, volume="vol", folder="c", nodes=3):
        if not (CONTROL_BINARIES / "storagectl").exists():
            raise SkipTest("no storagectl; build it with: swift build --scratch-path .build")
        self.directory = pathlib.Path(tempfile.mkdtemp(
            prefix="hr-", dir=os.environ.get("HAPTERA_TEST_DIR", "/var/tmp")))
        self.cluster = self.directory / folder
        self.environment = {
            **os.environ, "HAPTERA_IO": context.backend,
            "HAPTERA_BIN_DIR": f"{BINARIES}:{CONTROL_BINARIES}",
            "XDG_CONFIG_HOME": str(self.directory / "config")}
        self.environment.pop("HAPTERA_SERVER", None)
        self.name, self.nodes = volume, nodes
        self.random = random.Random(context.seed)

    def __enter__(self):
        self.up()
        return self

    def __exit__(self, *failure):
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)

    def up(self):
        self.run("cluster", "up", "--dir", str(self.cluster), "--nodes", str(self.nodes))

    def start(self, *words):
        """Without waiting."""
        return subprocess.Popen(
            [CONTROL_BINARIES / "storagectl", *words, "-o", "json"], env=self.environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def start_bytes(self, *words):
        """Without waiting; its output is no text."""
        return subprocess.Popen(
            [CONTROL_BINARIES / "storagectl", *words], env=self.environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, *words, fails=False):
        done = subprocess.run(
            [CONTROL_BINARIES / "storagectl", *words, "-o", "json"], env=self.environment,
            capture_output=True, text=True, timeout=180)
        if fails:
            assert done.returncode != 0, (words, done.stdout)
            return done.stderr
        assert done.returncode == 0, (words, done.stderr, done.stdout)
        return json.loads(done.stdout)

    def volume(self):
        return self.run("volume", "show", self.name)

    def replicas(self):
        return {replica["node"]: replica for replica in self.volume()["replicas"]}

    def until(self, what, condition):
        return wait_for(lambda: condition(self.volume()), what)

    def pids(self, directory=None):
        """Processes that have the cluster's directory, or one below it, in their arguments."""
        found = []
        words = f"{directory or self.cluster}/".encode()
        for entry in pathlib.Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                pid = int(entry.name)
                if words in (entry / "cmdline").read_bytes():
                    found.append(pid)
        return found

    def daemon(self, name):
        """Its process, an engine's or replica's too (`node-1/run/e-ID`); asks no controller."""
        return json.loads((self.cluster / f"{name}.pid").read_text())["identity"]["pid"]

    def kill(self, pid):
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not alive(pid), f"process {pid} to end")

    def kill_all(self):
        """Until none is left: a node agent may just have started one."""
        def left():
            living = [pid for pid in self.pids() if alive(pid)]
            for pid in living:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return living
        wait_for(lambda: not left(), "all processes to end")

    def image(self, size):
        path = self.directory / "image"
        path.write_bytes(self.random.randbytes(size))
        return path

    def write(self, path, offset=0):
        """Written and flushed."""
        length = path.stat().st_size
        subprocess.run(
            ["qemu-io", "-f", "raw", "-c", f"write -s {path} {offset} {length}", "-c", "flush",
             self.volume()["engine"]["uri"]],
            check=True, capture_output=True, timeout=120)

    def read(self):
        path = self.directory / "copy"
        path.unlink(missing_ok=True)
        subprocess.run(
            ["nbdcopy", self.volume()["engine"]["uri"], path], check=True, timeout=120)
        return path.read_bytes()


def alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
