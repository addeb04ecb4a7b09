"""Frame header and volume record, written against docs/wire-protocol.md.

A second implementation on purpose: a field moved by mistake in the product does not move here.
"""

import struct
from dataclasses import dataclass, field, replace

GET_RECORD, COMPARE_AND_SWAP = 64, 65
OK, INVALID, NOT_FOUND, CONFLICT, UNAVAILABLE = 0, 5, 6, 7, 8
REPLY = 1

_HEADER = struct.Struct("<4sHHQQQQIIIIQII")
HEADER_SIZE = _HEADER.size
assert HEADER_SIZE == 72


def _crc_table():
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _crc_table()


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


@dataclass
class Header:
    kind: int
    flags: int = 0
    epoch: int = 0
    tag: int = 0
    sequence: int = 0
    offset: int = 0
    length: int = 0
    table_length: int = 0
    data_length: int = 0
    status: int = 0
    auxiliary: int = 0
    table_checksum: int = 0

    def encode(self):
        raw = _HEADER.pack(
            b"HPT1", self.kind, self.flags, self.epoch, self.tag, self.sequence, self.offset,
            self.length, self.table_length, self.data_length, self.status, self.auxiliary,
            self.table_checksum, 0)
        return raw[:68] + struct.pack("<I", crc32c(raw[:68]))

    @staticmethod
    def decode(raw):
        fields = _HEADER.unpack(raw)
        if fields[0] != b"HPT1" or fields[-1] != crc32c(raw[:68]):
            raise ValueError("not a frame header")
        return Header(*fields[1:-1])


def reply(request, status, table=b""):
    """The reply frame's bytes."""
    header = replace(
        request, flags=REPLY, status=status, data_length=0, table_length=len(table), auxiliary=0,
        table_checksum=crc32c(table) if table else 0)
    return header.encode() + table


@dataclass
class Record:
    """The volume record; `encode` and `decode` follow `VolumeRecord.encoded()`."""

    volume: bytes  # 16: high and low half, each little-endian
    name: str
    size: int
    in_sync: list  # of (replica, incarnation)
    epoch: int = 1
    nonce: int = 1
    engine: int = 0
    client_generation: int = 0
    promised: int = 0
    lease_milliseconds: int = 500
    min_in_sync: int = 1
    clean: int = 1
    change: int = 0
    endpoint: str = ""
    joining: list = field(default_factory=list)
    # (replica, incarnation, leftEpoch, S epoch, S sequence, partedEpoch, reason, kept)
    out: list = field(default_factory=list)
    lineage: list = field(default_factory=list)  # (epoch, survivor, partedEpoch)
    layers: list = field(default_factory=lambda: [1])
    snapshots: list = field(default_factory=list)  # (layer, created, name)
    growths: list = field(default_factory=list)  # (head, sizeBefore)
    reverts: list = field(default_factory=list)  # (head, target)

    def encode(self):
        def text(value):
            raw = value.encode()
            return struct.pack("<I", len(raw)) + raw

        def rows(form, values):
            packed = [struct.pack(form, *v) if isinstance(v, tuple) else struct.pack(form, v)
                      for v in values]
            return struct.pack("<I", len(packed)) + b"".join(packed)

        version = 5 if self.reverts else 4 if self.growths else 3
        body = struct.pack("<II", 0x56455248, version) + self.volume + struct.pack(
            "<QQQQQQIBBB", self.epoch, self.nonce, self.size, self.engine,
            self.client_generation, self.promised, self.lease_milliseconds, self.min_in_sync, self.clean, self.change)
        body += text(self.name) + text(self.endpoint)
        body += rows("<QQ", self.in_sync) + rows("<QQ", self.joining)
        body += rows("<QQQQQQBB", self.out) + rows("<QQQ", self.lineage) + rows("<I", self.layers)
        body += struct.pack("<I", len(self.snapshots))
        for layer, created, name in self.snapshots:
            body += struct.pack("<IQ", layer, created) + text(name)
        if version > 3:
            body += rows("<IQ", self.growths)
        if version > 4:
            body += rows("<II", self.reverts)
        return body + struct.pack("<I", crc32c(body))

    @staticmethod
    def decode(raw):
        if struct.unpack("<I", raw[-4:])[0] != crc32c(raw[:-4]):
            raise ValueError("record checksum")
        position = 0

        def take(form):
            nonlocal position
            values = struct.unpack_from(form, raw, position)
            position += struct.calcsize(form)
            return values

        def text():
            nonlocal position
            (count,) = take("<I")
            position += count
            return raw[position - count:position].decode()

        def rows(form):
            (count,) = take("<I")
            values = [take(form) for _ in range(count)]
            return [v[0] if len(v) == 1 else v for v in values]

        magic, version = take("<II")
        if magic != 0x56455248 or version not in (3, 4, 5):
            raise ValueError("not a volume record")
        (volume,) = take("<16s")
        (epoch, nonce, size, engine, generation, promised, lease, minimum, clean,
         change) = take("<QQQQQQIBBB")
        name, endpoint = text(), text()
        record = Record(
            volume, name, size, rows("<QQ"), epoch, nonce, engine, generation, promised, lease,
            minimum, clean, change, endpoint, rows("<QQ"), rows("<QQQQQQBB"), rows("<QQQ"), rows("<I"))
        (count,) = take("<I")
        record.snapshots = [(*take("<IQ"), text()) for _ in range(count)]
        if version > 3:
            record.growths = rows("<IQ")
        if version > 4:
            record.reverts = rows("<II")
        if position != len(raw) - 4:
            raise ValueError("trailing bytes")
        return record
