"""Strangers on every port, and the history checker itself."""

import os
import random
import socket

from harness.cluster import wait_for
from harness.frames import Header
from harness.workload import History, Workload, check_all, content


def test_strangers_cost_nobody_anything(context):
    """Random bytes, half frames and huge lengths on every port, while a client works."""
    source = random.Random(context.seed)
    with context.cluster() as cluster:
        cluster.up()
        history = History(4096)
        load = Workload(history, cluster.engine.unix, context.seed).start()
        load.wait_completed(500)
        ports = [cluster.engine.port] + [r.port for r in cluster.replicas]

        def descriptors():
            return [len(os.listdir(f"/proc/{p.pid}/fd")) for p in cluster.processes()]

        before, epoch = descriptors(), cluster.record().epoch
        resident = [p.rss_bytes() for p in cluster.processes()]
        held = []
        for turn in range(200):
            stranger = socket.create_connection(("127.0.0.1", source.choice(ports)))
            header = Header(source.choice((1, 2, 3, 5, 9, 12, 64)))
            header.table_length = source.choice((0, 4, 65536))
            header.data_length = source.choice((0, 4096, 1 << 20))
            header.length = 0xFFFFFFFF
            header.offset = source.getrandbits(64)
            payloads = (
                source.randbytes(source.randrange(1, 400)), header.encode(),
                header.encode()[:40], header.encode() + source.randbytes(300),
                b"NBDMAGICIHAVEOPT" + source.randbytes(64),
                b"\0\0\0\3IHAVEOPT\0\0\0\7\xff\xff\xff\xff")
            try:
                stranger.sendall(source.choice(payloads))
            except OSError:
                pass  # hung up on already
            if turn % 4 == 0 and len(held) < 20:
                held.append(stranger)  # stays, and never says another word
            else:
                stranger.close()
        load.wait_completed(1000)
        error = load.stop()
        assert error is None, f"the client got an error: {error}"
        for stranger in held:
            stranger.close()
        wait_for(lambda: descriptors() <= before, f"descriptors to go back to {before}", 20)
        grown = [p.rss_bytes() - r for p, r in zip(cluster.processes(), resident)]
        assert max(grown) < 64 << 20, f"resident memory grew by {grown} bytes"
        assert cluster.record().epoch == epoch, "a stranger cost a member its place"
        check_all(history, cluster.engine.unix)
        cluster.check_copies()
        return (f"200 strangers, longest gap {load.longest_gap * 1e3:.0f} ms; growth "
                f"{[g // 1024 for g in grown]} KiB")


def test_the_history_notices(context):
    """The checker of all other tests fails where it should."""
    def refuses(history, data):
        try:
            history.check(5, data)
        except AssertionError:
            return True
        return False

    history = History(16)
    first = history.issue(5, 1, False)
    history.acknowledge(5, 1, first)
    assert refuses(history, bytes(4096)), "a lost write"
    assert refuses(history, content(6, first)), "another block's data"
    assert refuses(history, content(5, first)[:2048] + bytes(2048)), "a torn block"
    second = history.issue(5, 1, False)
    history.check(5, content(5, first), settles=False)
    history.check(5, content(5, second))  # of unknown outcome, seen: from now on it must stay
    assert refuses(history, content(5, first)), "a read that went back in time"
    third = history.issue(5, 1, True)
    history.acknowledge(5, 1, third)
    assert refuses(history, content(5, second)), "trimmed data that came back"
    history.check(5, bytes(4096))
