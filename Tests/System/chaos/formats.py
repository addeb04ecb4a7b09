"""Where things are in a replica's files (docs/formats.md), and bits flipped in them."""

import os
import struct

from .data import BLOCK

RING, RECORD = 8192, 32
_LOG_HEADER = struct.Struct("<4sIQQQ")  # magic, format, counter, tail, capacity


def layers(directory, kind):
    """The files of all layers, lowest first; `kind` is data or table."""
    return sorted((directory / "layers").glob(f"*.{kind}"), key=lambda path: int(path.stem))


def harm_tables(directory, source):
    """Flips a bit in some pages of one layer's table; what was done, in words."""
    path = source.choice(layers(directory, "table"))
    with open(path, "r+b") as file:
        pages = [page for page in range(os.fstat(file.fileno()).st_size // BLOCK)
                 if file.seek(page * BLOCK) is not None and any(file.read(64))]
        # Of a page all is covered by its checksum.
        chosen = source.sample(pages, min(len(pages), source.choice((1, 3, 10))))
        for page in chosen:
            _flip(file, page * BLOCK, BLOCK, source)
    return f"{len(chosen)} of {len(pages)} pages of {path.name} damaged"


def harm_log(directory, source):
    """Flips a bit in a record of the activity log that counts, but for the last one: nothing tells
    that that one is missing. What was done, in words."""
    with open(directory / "activity.log", "r+b") as file:
        indices = _records(file)
        if len(indices) < 2:
            return "no record of the log to damage"
        index, capacity = source.choice(indices[:-1]), _newest_header(file)[4]
        _flip(file, RING + index % capacity * RECORD, RECORD, source)
        return f"record {index} of {indices[0]}...{indices[-1]} of the log damaged"


def _newest_header(file):
    headers = []
    for offset in (0, BLOCK):
        file.seek(offset)
        header = _LOG_HEADER.unpack(file.read(_LOG_HEADER.size))
        if header[0] == b"HPAL":
            headers.append(header)
    return max(headers, key=lambda header: header[2])


def _records(file):
    """Indices of those from the tail on, in their order."""
    *_, tail, capacity = _newest_header(file)
    file.seek(RING)
    ring = file.read(capacity * RECORD)
    found = []
    for slot in range(capacity):
        (index,) = struct.unpack_from("<Q", ring, slot * RECORD + 8)
        if index >= tail and index % capacity == slot and ring[slot * RECORD + 4]:
            found.append(index)
    return sorted(found)


def _flip(file, start, length, source):
    at = start + source.randrange(length)
    file.seek(at)
    (byte,) = file.read(1)
    file.seek(at)
    file.write(bytes([byte ^ 1 << source.randrange(8)]))
    file.flush()
    os.fdatasync(file.fileno())
