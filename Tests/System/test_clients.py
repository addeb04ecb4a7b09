"""Real NBD clients, and hostile ones, against replicated volumes: the whole interop suite."""

import pathlib
import re
import subprocess

from harness.cluster import MIB

SUITE = pathlib.Path(__file__).resolve().parents[1] / "Interop/run"
SIZE = 64 * MIB


def run_suite(context, replicas):
    with context.cluster(size=SIZE, replicas=replicas) as cluster:
        cluster.up()
        done = subprocess.run(
            ["/usr/bin/python3", SUITE, "--uri", f"nbd://127.0.0.1:{cluster.engine.port}/volume",
             "--unix-uri", f"nbd+unix:///volume?socket={cluster.engine.unix}",
             "--size", str(SIZE)],
            capture_output=True, text=True, timeout=900)
        counted = re.findall(r"^(\d+) passed, (\d+) failed$", done.stdout, re.M)
        assert done.returncode == 0 and counted, done.stdout[-3000:] + done.stderr[-1000:]
        cluster.wait_healthy()
        cluster.check_copies()
        return f"{counted[-1][0]} cases, then all copies equal"


def test_nbd_clients_on_one_replica(context):
    return run_suite(context, 1)


def test_nbd_clients_on_three_replicas(context):
    return run_suite(context, 3)
