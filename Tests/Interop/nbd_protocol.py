"""Protocol cases: what the server must answer, and what hostile clients must not achieve.

Each case gets a `Context` (see `run`) and a `Target`; it raises on failure. Cases overwrite the
first 64 MiB of the export and its end.
"""

import random
import struct
import threading

from nbd_client import *

CASES = []
MIB = 1 << 20


def case(body):
    CASES.append(body)
    return body


def pattern(seed, length):
    return random.Random(seed).randbytes(length)


def expect(got, wanted, what=""):
    assert got == wanted, f"{what}: got {got!r}, wanted {wanted!r}"


FORMATS = [{}, {"structured": True}, {"extended": True}]


@case
def greeting_and_flags(ctx, target):
    with Client(target) as client:
        expect(client.handshake_flags, 3)
    for flags in (4, 0x80000003):
        with Client(target, flags=flags) as client:
            assert client.is_closed()


@case
def export_name(ctx, target):
    for flags, padding in ((3, 0), (1, 124), (0, 124)):
        for name in (target.name, ""):
            with Client(target, flags=flags) as client:
                data = name.encode()
                client.sock.sendall(
                    struct.pack(">QII", OPTION_MAGIC, EXPORT_NAME, len(data)) + data)
                size, transmission = struct.unpack(">QH", client.receive(10))
                expect(client.receive(padding), bytes(padding))
                expect(size, ctx.size)
                expect(transmission & 0x7F, 0x6D & transmission)
                expect(client.error(READ, 0, 512), 0)
    for name in (target.name + "x", "no such export", "x" * 4096, "x" * 70000):
        with Client(target) as client:
            client.sock.sendall(
                struct.pack(">QII", OPTION_MAGIC, EXPORT_NAME, len(name)) + name.encode())
            assert client.is_closed(), name[:20]


@case
def options(ctx, target):
    with Client(target) as client:
        listed = client.option(LIST)
        expect([kind for kind, _ in listed], [SERVER, ACK])
        expect(listed[0][1][4:].decode(), target.name)
        for option in (4, 12, 0xFFFFFFFF):
            expect(client.option(option, b"data")[0][0], ERR_UNSUP)
        expect(client.option(LIST, b"x")[0][0], ERR_INVALID)
        expect(client.option(9999, bytes(200_000))[0][0], ERR_TOO_BIG)
        expect(client.option(INFO, client.name_data("nobody"))[0][0], ERR_UNKNOWN)
        expect(client.option(GO, client.name_data("x" * 4096))[0][0], ERR_UNKNOWN)
        expect(client.option(GO, b"\xff\xff\xff\xff\0\0")[0][0], ERR_INVALID)
        expect(client.option(GO, b"")[0][0], ERR_INVALID)
        info = client.option(INFO, client.name_data("", [3, 1]))
        expect([kind for kind, _ in info], [REP_INFO] * 3 + [ACK])
        sizes = next(data for _, data in info if data[:2] == b"\0\3")
        expect(struct.unpack(">III", sizes[2:]), (512, 4096, 32 * MIB))
        client.go()
        expect(client.size, ctx.size)
    with Client(target) as client:
        expect(client.option(ABORT), [(ACK, b"")])
        assert client.is_closed()


@case
def meta_contexts(ctx, target):
    with Client(target) as client:
        name = target.name
        expect(client.option(SET_META, client.query_data(name, ["base:allocation"]))[0][0],
               ERR_INVALID)
        client.option(STRUCTURED)
        for queries in ([], ["base:"], ["x:y", "base:allocation"]):
            replies = client.option(LIST_META, client.query_data(name, queries))
            expect([kind for kind, _ in replies], [META, ACK])
        expect([k for k, _ in client.option(LIST_META, client.query_data(name, ["q:z"]))], [ACK])
        bad = client.query_data(name, ["base:allocation"])
        for cut in range(len(bad)):
            expect(client.option(SET_META, bad[:cut])[0][0], ERR_INVALID)
        # Nothing is selected now: BLOCK_STATUS is refused, in step.
        client.format = "structured"
        client.go()
        expect(client.error(BLOCK_STATUS, 0, 4096), EINVAL)
        expect(client.error(READ, 0, 512), 0)


@case
def read_and_write_in_every_format(ctx, target):
    for index, form in enumerate(FORMATS):
        with Client(target).go(**form) as client:
            data = pattern(index, 3 * MIB + 8192)
            at = MIB - 4096
            client.write(at, data)
            expect(client.read(at, len(data)) == data, True, form)
            expect(client.read(at + 512, 1024), data[512:1536], form)
            if form:
                expect(client.read(at, MIB, DF) == data[:MIB], True, form)


@case
def the_largest_request(ctx, target):
    with Client(target).go(structured=True, sizes=True) as client:
        data = pattern(9, 32 * MIB)
        client.write(512, data)
        expect(client.read(512, 32 * MIB) == data, True)
        expect(client.read(512, 32 * MIB, DF) == data, True)
        expect(client.error(READ, 0, 32 * MIB + 512), EOVERFLOW)
        expect(client.error(READ, 0, 32 * MIB + 512, DF), EOVERFLOW)
        expect(client.read(512, 512), data[:512])
    with Client(target).go() as client:
        expect(client.error(READ, 0, 32 * MIB + 512), EINVAL)
        expect(client.error(WRITE, 0, 33 * MIB, payload=bytes(33 * MIB)), EINVAL)
        expect(client.read(512, 512), data[:512])


@case
def byte_granular_requests(ctx, target):
    """A client that agreed on no block size may ask for single bytes; a model says what it gets."""
    rng = random.Random(77)
    span = 3 * MIB
    base = MIB // 2
    with Client(target).go(structured=True) as client:
        model = bytearray(pattern(5, span))
        client.write(base, bytes(model))
        for step in range(300):
            at = rng.randrange(span)
            length = min(span - at, rng.choice((1, 7, 511, 513, 4095, 4097, 70_001)))
            action = rng.choice((WRITE, WRITE, WRITE_ZEROES, READ))
            if action == WRITE:
                data = pattern(step, length)
                client.write(base + at, data, rng.choice((0, FUA)))
                model[at:at + length] = data
            elif action == WRITE_ZEROES:
                flags = rng.choice((0, NO_HOLE, FAST_ZERO, FUA))
                expect(client.error(WRITE_ZEROES, base + at, length, flags), 0)
                model[at:at + length] = bytes(length)
            else:
                expect(client.read(base + at, length) == model[at:at + length], True, step)
        expect(client.read(base, span) == model, True)


@case
def overlapping_sub_block_writes(ctx, target):
    """Many writes to parts of the same blocks in flight at once: none undoes its neighbour."""
    with Client(target).go(structured=True) as client:
        client.write(0, bytes(16384))
        parts = {at: pattern(at, 256) for at in range(0, 16384, 256)}
        order = list(parts)
        random.Random(3).shuffle(order)
        cookies = {client.send(WRITE, at, 256, payload=parts[at]) for at in order}
        while cookies:
            cookie, reply = client.receive_reply()
            expect(reply.error, 0)
            cookies.remove(cookie)
        expect(client.read(0, 16384), b"".join(parts[at] for at in sorted(parts)))


@case
def alignment_for_those_who_agreed(ctx, target):
    with Client(target).go(sizes=True) as client:
        for offset, length in ((1, 512), (512, 100), (511, 1)):
            expect(client.error(READ, offset, length), EINVAL)
            expect(client.error(WRITE, offset, length, payload=bytes(length)), EINVAL)
            expect(client.error(TRIM, offset, length), EINVAL)
        expect(client.error(READ, 512, 512), 0)


@case
def past_the_end(ctx, target):
    size = ctx.size
    for form in FORMATS:
        with Client(target).go(**form) as client:
            ranges = [(size, 512), (size - 512, 1024), (1 << 63, 512), ((1 << 64) - 512, 512),
                      ((1 << 64) - 1, 1), ((1 << 63) - 1, 4096)]
            for offset, length in ranges:
                expect(client.error(READ, offset, length), EINVAL, (form, offset))
                expect(client.error(TRIM, offset, length), EINVAL)
                expect(client.error(CACHE, offset, length), EINVAL)
                expect(client.error(WRITE_ZEROES, offset, length), ENOSPC)
                expect(client.error(WRITE, offset, length, payload=bytes(length)), ENOSPC)
            expect(client.error(READ, size - 512, 512), 0)
    with Client(target).go(extended=True, meta=True) as client:
        for length in (1 << 62, (1 << 64) - 512, size + 512):
            expect(client.error(TRIM, 0, length), EINVAL)
            expect(client.error(WRITE_ZEROES, 0, length), ENOSPC)
            expect(client.error(BLOCK_STATUS, 0, length), EINVAL)
            expect(client.error(READ, 0, length), EINVAL)
        expect(client.error(READ, 0, 512), 0)


@case
def refused_commands_keep_the_stream_in_step(ctx, target):
    for form in FORMATS:
        with Client(target).go(**form) as client:
            for command in (8, 9, 0xFFFF):
                expect(client.error(command, 0, MIB), EINVAL)
            expect(client.error(READ, 0, 512, NO_HOLE), EINVAL)
            expect(client.error(FLUSH, 512, 0), EINVAL)
            expect(client.error(FLUSH, 0, 512), EINVAL)
            expect(client.error(WRITE, 0, 512, 1 << 9, payload=bytes(512)), EINVAL)
            if not form:
                expect(client.error(READ, 0, 512, DF), EINVAL)
            if form == {"extended": True}:
                # A payload nobody asked for is consumed.
                expect(client.error(READ, 0, 512, PAYLOAD_LEN, payload=bytes(512)), EINVAL)
            # A payload that looks like requests is a payload.
            fake = client.header(READ, 0, 512) * 40
            expect(client.error(WRITE, ctx.size, 1024, payload=fake[:1024]), ENOSPC)
            expect(client.error(READ, 0, 512), 0)


@case
def empty_requests(ctx, target):
    for form in FORMATS:
        with Client(target).go(**form) as client:
            for command in (READ, WRITE, TRIM, WRITE_ZEROES, CACHE):
                expect(client.error(command, 4096, 0), 0, (form, command))
            expect(client.error(READ, 0, 512), 0)


@case
def fua_on_everything(ctx, target):
    with Client(target).go(structured=True, meta=True) as client:
        client.write(0, pattern(1, 2 * MIB), FUA)
        expect(client.error(READ, 0, 512, FUA), 0)
        expect(client.error(FLUSH, 0, 0, FUA), 0)
        expect(client.error(TRIM, 0, 8192, FUA), 0)
        expect(client.error(WRITE_ZEROES, 0, 3 * MIB, FUA), 0)
        expect(client.error(CACHE, 0, 4096, FUA), 0)
        expect(client.error(BLOCK_STATUS, 0, 4096, FUA), 0)
        expect(client.read(0, 3 * MIB) == bytes(3 * MIB), True)


@case
def trims_and_zeroes_read_zero(ctx, target):
    with Client(target).go(structured=True) as client:
        data = pattern(4, 4 * MIB)
        for command, flags in ((TRIM, 0), (WRITE_ZEROES, 0), (WRITE_ZEROES, NO_HOLE),
                               (WRITE_ZEROES, FAST_ZERO)):
            client.write(0, data)
            expect(client.error(command, MIB - 8192, 2 * MIB + 4096, flags), 0)
            got = client.read(0, 4 * MIB)
            middle = slice(MIB - 8192, 3 * MIB - 4096)
            expect(got[:middle.start] == data[:middle.start], True)
            expect(got[middle] == bytes(middle.stop - middle.start), True)
            expect(got[middle.stop:] == data[middle.stop:], True)


@case
def whole_export_trimmed(ctx, target):
    """One request of the whole size, by extended headers; others are served meanwhile."""
    with Client(target).go(extended=True, meta=True) as client, \
            Client(target).go() as other:
        client.write(ctx.size - 4096, pattern(2, 4096))
        cookie = client.send(TRIM, 0, ctx.size)
        expect(other.error(READ, 0, 512), 0)
        got, reply = client.receive_reply()
        expect((got, reply.error), (cookie, 0))
        expect(client.read(ctx.size - 4096, 4096), bytes(4096))
        expect(client.error(WRITE_ZEROES, 0, ctx.size, NO_HOLE | FUA), 0)
        expect(client.error(TRIM, 0, ctx.size, FUA), 0)


@case
def allocation_states(ctx, target):
    for form in FORMATS[1:]:
        with Client(target).go(meta=True, **form) as client:
            expect(client.error(TRIM, 0, 4 * MIB), 0)
            client.write(65536, pattern(1, 65536))
            client.write(2 * MIB, pattern(2, 8192))
            expect(client.error(WRITE_ZEROES, 131072, 65536, NO_HOLE), 0)
            expect(client.error(WRITE_ZEROES, 196608, 65536), 0)
            kept = 2 if ctx.tells_zeroes else 3
            wanted = [(65536, 3), (65536, 0)]
            wanted += [(65536, 2), (65536, 3)] if kept == 2 else [(131072, 3)]
            expect(client.status(0, 262144), wanted, form)
            expect(client.status(65536 + 4096, 8192), [(8192, 0)])
            expect(client.status(0, 4 * MIB, REQ_ONE), [(65536, 3)])
            expect(client.status(65536, 4 * MIB, REQ_ONE), [(65536, 0)])
            # Walking the whole range in whatever pieces come covers it, with the right data.
            at = 0
            data = []
            while at < 4 * MIB:
                for length, flags in client.status(at, 4 * MIB - at):
                    assert length > 0 and length % 512 == 0
                    if flags == 0:
                        data.append((at, length))
                    at += length
            expect(data, [(65536, 65536), (2 * MIB, 8192)])
            expect(client.error(BLOCK_STATUS, 0, 0), EINVAL)
    with Client(target).go(extended=True, meta=True) as client:
        extents = client.status(0, ctx.size)
        assert 0 < sum(length for length, _ in extents) <= ctx.size


@case
def holes_are_sent_as_holes(ctx, target):
    if not ctx.tells_holes:
        return "skipped: this device reports holes by status only"
    for form in FORMATS[1:]:
        with Client(target).go(**form) as client:
            expect(client.error(TRIM, 0, 4 * MIB), 0)
            client.write(MIB, pattern(1, MIB))
            reply = client.ask(READ, 0, 3 * MIB)
            expect(reply.holes, {0: MIB, 2 * MIB: MIB})
            expect(reply.content(0, 3 * MIB)[MIB:2 * MIB] == pattern(1, MIB), True)
            # Unfragmented: one chunk, zeroes spelled out; a pure hole stays one.
            reply = client.ask(READ, 0, 3 * MIB, DF)
            expect([kind for kind in reply.chunks if kind in (1, 2)], [1])
            expect(client.ask(READ, 2 * MIB, 2 * MIB, DF).holes, {2 * MIB: 2 * MIB})


@case
def wrong_magic_hangs_up(ctx, target):
    for form in FORMATS:
        with Client(target).go(**form) as client:
            client.sock.sendall(client.header(READ, 0, 512, magic=0x12345678))
            assert client.is_closed()
        with Client(target).go(**form) as client:
            client.sock.sendall(b"GET ")
            assert client.is_closed()
    with Client(target) as client:
        client.sock.sendall(bytes(16))
        assert client.is_closed()
    with Client(target).go(extended=True) as client:
        client.sock.sendall(client.header(WRITE, 0, 1 << 40))
        assert client.is_closed()


@case
def disconnect_answers_what_is_in_flight(ctx, target):
    for form in FORMATS:
        with Client(target).go(**form) as client:
            cookies = {client.send(READ, index * 65536, 65536) for index in range(100)}
            client.sock.sendall(client.header(DISC))
            while cookies:
                cookie, reply = client.receive_reply()
                expect(reply.error, 0)
                cookies.remove(cookie)
            assert client.is_closed()


@case
def half_close_answers_what_is_in_flight(ctx, target):
    with Client(target).go(structured=True) as client:
        cookies = {client.send(WRITE, index * 4096, 4096, payload=bytes([index]) * 4096)
                   for index in range(60)}
        cookies |= {client.send(READ, 0, 4096) for _ in range(60)}
        client.sock.shutdown(socket.SHUT_WR)
        while cookies:
            cookie, reply = client.receive_reply()
            expect(reply.error, 0)
            cookies.remove(cookie)
        assert client.is_closed()


@case
def pipelining_beyond_every_limit(ctx, target):
    """More requests than a connection may have in flight, sent without reading a reply."""
    with Client(target).go(structured=True) as client:
        client.write(0, pattern(8, MIB))
        cookies = set()
        sender = threading.Thread(target=lambda: cookies.update(
            client.send(READ, index % 200 * 4096, 4096) for index in range(2000)))
        sender.start()
        seen = set()
        for _ in range(2000):
            cookie, reply = client.receive_reply()
            expect(reply.error, 0)
            seen.add(cookie)
        sender.join()
        expect(seen == cookies and len(seen) == 2000, True)


@case
def a_cut_write_is_not_applied(ctx, target):
    with Client(target).go() as watcher:
        for length, sent in ((4096, 4095), (4096, 0), (3 * MIB, 2 * MIB), (MIB, MIB - 1)):
            before = pattern(length, length)
            watcher.write(0, before)
            for ending in ("close", "half"):
                with Client(target).go() as client:
                    header = client.header(WRITE, 0, length)
                    client.sock.sendall(header + b"\xee" * sent)
                    if ending == "half":
                        client.sock.shutdown(socket.SHUT_WR)
                        assert client.is_closed()
            expect(watcher.read(0, length) == before, True, (length, sent))


@case
def connections_share_one_cache(ctx, target):
    """What one connection wrote, a flush on another covers and a third one reads."""
    with Client(target).go() as a, Client(target).go() as b, Client(target).go() as c:
        assert a.flags & 0x100, "CAN_MULTI_CONN"
        for step in range(50):
            data = pattern(step, 8192)
            a.write(step * 8192, data)
            expect(b.error(FLUSH), 0)
            expect(c.read(step * 8192, 8192), data)


@case
def a_client_that_never_reads_costs_nobody(ctx, target):
    with Client(target).go() as greedy, Client(target).go() as other:
        other.write(0, pattern(6, 4096))
        greedy.sock.settimeout(2)
        try:
            for index in range(4000):
                greedy.send(READ, index % 32 * MIB, MIB)
        except TimeoutError:
            pass
        for _ in range(50):
            expect(other.read(0, 4096), pattern(6, 4096))
        ctx.check_memory()


@case
def stalled_clients_cost_nobody(ctx, target):
    """Halves of headers and payloads that never go on."""
    stalled = []
    try:
        for index in range(20):
            client = Client(target).go()
            header = client.header(WRITE, 0, MIB)
            client.sock.sendall(header[:index + 1] if index % 2 else header + bytes(100))
            stalled.append(client)
        with Client(target).go() as other:
            data = pattern(1, 4 * MIB)
            other.write(8 * MIB, data)
            expect(other.read(8 * MIB, 4 * MIB) == data, True)
        ctx.check_memory()
    finally:
        for client in stalled:
            client.sock.close()


@case
def too_many_connections(ctx, target):
    clients = []
    try:
        refused = 0
        for _ in range(80):
            try:
                clients.append(Client(target).go())
            except (Closed, ConnectionError):
                refused += 1
        assert 0 < refused < 40, f"{refused} refused"
        for client in clients:
            expect(client.error(READ, 0, 512), 0)
    finally:
        for client in clients:
            client.sock.close()
    # Room again once they have gone.
    ctx.wait(lambda: can_connect(target), "no new connection after the others left")


def can_connect(target):
    try:
        with Client(target).go() as client:
            return client.error(READ, 0, 512) == 0
    except (Closed, ConnectionError):
        return False


@case
def coming_and_going_leaks_nothing(ctx, target):
    before = ctx.descriptors()
    rng = random.Random(11)
    for index in range(300):
        with Client(target) as client:
            if index % 3:
                client.go(structured=index % 2 == 0)
                for _ in range(rng.randrange(4)):
                    client.send(READ, 0, 65536)
                client.sock.sendall(client.header(WRITE, 0, 65536) + bytes(rng.randrange(65536)))
    ctx.wait(lambda: ctx.descriptors() <= before + 2, "descriptors leak")
    expect(can_connect(target), True)


@case
def garbage(ctx, target):
    """Streams that are wrong in random ways; the server goes on serving others."""
    rng = random.Random(2024)
    for index in range(200):
        try:
            with Client(target, flags=3, timeout=10) as client:
                if index % 2:
                    client.go(**FORMATS[index % 3])
                    good = b"".join(
                        client.header(rng.randrange(9), rng.randrange(1 << 20) * 512,
                                      rng.randrange(1 << 12), rng.randrange(64))
                        for _ in range(20))
                else:
                    good = b"".join(
                        struct.pack(">QII", OPTION_MAGIC, rng.randrange(13), 20)
                        + rng.randbytes(20) for _ in range(20))
                bad = bytearray(good)
                for _ in range(rng.randrange(1, 10)):
                    bad[rng.randrange(len(bad))] = rng.randrange(256)
                client.sock.sendall(bytes(bad))
        except (Closed, ConnectionError, TimeoutError):
            pass
    expect(can_connect(target), True)
    ctx.check_memory()
