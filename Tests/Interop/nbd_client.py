"""A raw NBD client on the standard library alone: says exactly what a test wants said."""

import socket
import struct
import urllib.parse

OPTION_MAGIC = 0x49484156454F5054
REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
EXTENDED_REQUEST_MAGIC = 0x21E41C71
SIMPLE_MAGIC = 0x67446698
STRUCTURED_MAGIC = 0x668E33EF
EXTENDED_MAGIC = 0x6E8A278C

EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO = 1, 2, 3, 5, 6, 7
STRUCTURED, LIST_META, SET_META, EXTENDED = 8, 9, 10, 11
ACK, SERVER, REP_INFO, META = 1, 2, 3, 4
ERR_UNSUP, ERR_INVALID, ERR_UNKNOWN, ERR_TOO_BIG = (
    0x80000001, 0x80000003, 0x80000006, 0x80000009)

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = 1, 2, 4, 8, 16, 32
EPERM, EIO, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN = 1, 5, 22, 28, 75, 95, 108


class Closed(Exception):
    """The server closed the connection."""


class Target:
    """Where an export is, from its URI."""

    def __init__(self, uri):
        self.uri = uri
        parts = urllib.parse.urlsplit(uri)
        self.name = urllib.parse.unquote(parts.path[1:])
        self.is_unix = parts.scheme == "nbd+unix"
        if self.is_unix:
            self.address = urllib.parse.parse_qs(parts.query)["socket"][0]
        else:
            self.address = (parts.hostname, parts.port or 10809)

    def connect(self, timeout=30):
        family = socket.AF_UNIX if self.is_unix else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.settimeout(timeout)
        sock.connect(self.address)
        return sock


class Reply:
    """Everything that came for one request."""

    def __init__(self):
        self.error = 0
        self.data = {}  # offset -> bytes
        self.holes = {}  # offset -> length
        self.extents = []  # (length, flags)
        self.chunks = []  # types, in order

    def content(self, offset, length):
        """The bytes of a read; fails unless the chunks cover it exactly once."""
        out = bytearray(length)
        covered = 0
        for at, part in self.data.items():
            out[at - offset:at - offset + len(part)] = part
            covered += len(part)
        covered += sum(self.holes.values())
        assert covered == length and len(out) == length, f"{covered} of {length} bytes"
        return bytes(out)


class Client:
    def __init__(self, target, flags=3, timeout=30):
        self.target = target
        self.sock = target.connect(timeout)
        self.format = "simple"
        self.cookie = 0
        self.lengths = {}  # cookie -> (length, offset) of reads, for simple replies
        greeting = self.receive(18)
        assert greeting[:16] == b"NBDMAGICIHAVEOPT", greeting
        self.handshake_flags = struct.unpack(">H", greeting[16:])[0]
        if flags is not None:
            self.sock.sendall(struct.pack(">I", flags))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sock.close()

    def receive(self, count):
        parts = []
        while count:
            try:
                part = self.sock.recv(min(count, 1 << 20))
            except (ConnectionResetError, BrokenPipeError):
                raise Closed from None
            if not part:
                raise Closed
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def is_closed(self):
        """Waits for the server's end of the stream."""
        try:
            while self.receive(1):
                pass
        except Closed:
            return True

    # Options

    def option(self, option, data=b"", length=None):
        """Sends an option and returns its replies as (type, data)."""
        length = len(data) if length is None else length
        self.sock.sendall(struct.pack(">QII", OPTION_MAGIC, option, length) + data)
        return self.option_replies(option)

    def option_replies(self, option):
        replies = []
        while True:
            magic, echoed, kind, length = struct.unpack(">QIII", self.receive(20))
            assert (magic, echoed) == (REPLY_MAGIC, option)
            replies.append((kind, self.receive(length)))
            if kind == ACK or kind & 0x80000000:
                return replies

    @staticmethod
    def name_data(name, items=()):
        name = name.encode()
        return (struct.pack(">I", len(name)) + name + struct.pack(">H", len(items))
                + b"".join(struct.pack(">H", item) for item in items))

    @staticmethod
    def query_data(name, queries):
        name = name.encode()
        data = struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries))
        for query in queries:
            data += struct.pack(">I", len(query)) + query.encode()
        return data

    def go(self, structured=False, extended=False, meta=False, sizes=False):
        """Negotiates and enters transmission."""
        if structured:
            assert self.option(STRUCTURED)[-1][0] == ACK
            self.format = "structured"
        if extended:
            assert self.option(EXTENDED)[-1][0] == ACK
            self.format = "extended"
        if meta:
            replies = self.option(
                SET_META, self.query_data(self.target.name, ["base:allocation"]))
            assert [kind for kind, _ in replies] == [META, ACK], replies
        replies = self.option(GO, self.name_data(self.target.name, [3] if sizes else []))
        assert replies[-1][0] == ACK, replies
        info = next(data for _, data in replies if data[:2] == b"\0\0")
        self.size, self.flags = struct.unpack(">QH", info[2:])
        return self

    # Requests

    def header(self, command, offset=0, length=0, flags=0, magic=None):
        self.cookie += 1
        if self.format == "extended":
            if command == WRITE:
                flags |= PAYLOAD_LEN
            return struct.pack(
                ">IHHQQQ", magic or EXTENDED_REQUEST_MAGIC, flags, command, self.cookie,
                offset, length)
        return struct.pack(
            ">IHHQQI", magic or REQUEST_MAGIC, flags, command, self.cookie, offset, length)

    def send(self, command, offset=0, length=0, flags=0, payload=b""):
        """Sends a request without waiting; returns its cookie."""
        header = self.header(command, offset, length, flags)
        if command == READ:
            self.lengths[self.cookie] = (length, offset)
        self.sock.sendall(header + payload)
        return self.cookie

    def receive_reply(self):
        """The next complete reply, as (cookie, Reply)."""
        reply = Reply()
        while True:
            magic = struct.unpack(">I", self.receive(4))[0]
            if magic == SIMPLE_MAGIC:
                assert self.format != "extended"
                error, cookie = struct.unpack(">IQ", self.receive(12))
                reply.error = error
                length, offset = self.lengths.pop(cookie, (0, 0))
                if length and not error:
                    assert self.format == "simple", "a read needs chunks"
                    reply.data[offset] = self.receive(length)
                return cookie, reply
            if self.format == "extended":
                assert magic == EXTENDED_MAGIC, hex(magic)
                flags, kind, cookie, _, length = struct.unpack(">HHQQQ", self.receive(28))
            else:
                assert magic == STRUCTURED_MAGIC, hex(magic)
                flags, kind, cookie, length = struct.unpack(">HHQI", self.receive(16))
            self.chunk(reply, kind, self.receive(length))
            if flags & 1:
                self.lengths.pop(cookie, None)
                return cookie, reply

    def chunk(self, reply, kind, payload):
        reply.chunks.append(kind)
        if kind == 1:
            reply.data[struct.unpack(">Q", payload[:8])[0]] = payload[8:]
        elif kind == 2:
            offset, length = struct.unpack(">QI", payload)
            reply.holes[offset] = length
        elif kind == 5:
            assert self.format == "structured"
            reply.extents = list(struct.iter_unpack(">II", payload[4:]))
        elif kind == 6:
            assert self.format == "extended"
            assert struct.unpack(">I", payload[4:8])[0] * 16 + 8 == len(payload)
            reply.extents = list(struct.iter_unpack(">QQ", payload[8:]))
        elif kind & 0x8000:
            reply.error, length = struct.unpack(">IH", payload[:6])
            assert length == len(payload) - 6 and reply.error
        else:
            assert kind == 0 and not payload, kind

    def ask(self, command, offset=0, length=0, flags=0, payload=b""):
        cookie = self.send(command, offset, length, flags, payload)
        got, reply = self.receive_reply()
        assert got == cookie, (got, cookie)
        return reply

    def read(self, offset, length, flags=0):
        reply = self.ask(READ, offset, length, flags)
        assert reply.error == 0, reply.error
        return reply.content(offset, length)

    def write(self, offset, data, flags=0):
        reply = self.ask(WRITE, offset, len(data), flags, data)
        assert reply.error == 0, reply.error

    def error(self, command, offset=0, length=0, flags=0, payload=b""):
        return self.ask(command, offset, length, flags, payload).error

    def status(self, offset, length, flags=0):
        reply = self.ask(BLOCK_STATUS, offset, length, flags)
        assert reply.error == 0, reply.error
        return reply.extents
