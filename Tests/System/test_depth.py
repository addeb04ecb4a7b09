"""As many snapshots as a volume may have, with the longest names."""

import statistics
import time

import nbd

from harness.cluster import MIB, ControlError, control
from test_snapshots import connect, digest, take

COUNT = 1024


def named(number):
    return f"{number:04}" + "n" * 59


def pause_of(live, cluster, name):
    """Seconds: what the command takes, and what the write behind it waits."""
    begun = time.perf_counter()
    assert "existed" not in take(cluster, name)
    taken = time.perf_counter() - begun
    live.pwrite(b"%-4096d" % int(name[:4]), 0)
    return taken


def names(cluster):
    return sorted(
        key.split(".", 1)[1] for key in cluster.engine.status() if key.startswith("snapshot."))


def offered(cluster):
    """Names of exports, and of what has changed since which snapshot, as clients are told."""
    handle, exports, contexts = nbd.NBD(), [], []
    handle.set_opt_mode(True)
    handle.connect_unix(str(cluster.engine.unix))
    handle.opt_list(lambda name, _: exports.append(name) or 0)
    handle.set_export_name("volume")
    handle.add_meta_context("qemu:dirty-bitmap:")
    handle.opt_list_meta_context(lambda name: contexts.append(name) or 0)
    handle.opt_abort()
    prefixes = "volume@", "qemu:dirty-bitmap:"
    return [sorted(name.removeprefix(prefix) for name in found if name.startswith(prefix))
            for found, prefix in zip((exports, contexts), prefixes)]


def test_the_most_snapshots_with_the_longest_names(context):
    """On three replicas, all of it again after a replica and then the engine were killed."""
    with context.cluster(size=32 * MIB) as cluster:
        cluster.up()
        live = connect(cluster)
        expected = [named(number) for number in range(COUNT)]
        live.pwrite(b"begin" + bytes(4091), 0)
        begun = time.perf_counter()
        taken = [pause_of(live, cluster, name) for name in expected]
        passed = time.perf_counter() - begun
        try:
            take(cluster, "one-more")
            raise AssertionError("one more was taken")
        except ControlError as error:
            assert "no room for another snapshot" in str(error), error
        live.flush()
        live.shutdown()
        assert names(cluster) == expected
        assert offered(cluster) == [expected, expected]
        size = len(cluster.record().encode())
        kept = {name: digest(cluster, name) for name in (expected[0], expected[1], expected[-1])}
        assert len(set(kept.values())) == 3

        away = cluster.replicas[2]
        away.process.kill()
        cluster.engine.wait_state(away, "absent")
        away.start()
        cluster.engine.wait_state(away, "inSync")
        cluster.engine.process.kill()
        cluster.start_engine(client_generation=2)
        assert names(cluster) == expected
        for process in cluster.processes():
            process.kill()
        cluster.start_replicas()
        cluster.start_engine(client_generation=3)
        assert names(cluster) == expected
        assert take(cluster, expected[500])["existed"] == "1"
        for name, before in kept.items():
            assert digest(cluster, name) == before, f"{name} has changed"
        cluster.check_copies()
        first, last = (statistics.median(part) * 1e3 for part in (taken[:24], taken[-24:]))
        return (f"{COUNT} snapshots in {passed:.1f} s, a record of {size // 1024} KiB; taking one: "
                f"{first:.1f} ms at first, {last:.1f} ms at last (medians of 24)")
