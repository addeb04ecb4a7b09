"""Self-describing data: every 512-byte cell names its place and the write it came from."""

import struct

CELL = 512
BLOCK = 4096
CELLS = BLOCK // CELL
_MAGIC = 0x485054434841304F
_FORM = struct.Struct("<4Q")
_REPEATS = CELL // _FORM.size


def cell_content(cell, write):
    """Bytes of the volume's cell number `cell` after the write `write`; 0 is zeros."""
    if write == 0:
        return bytes(CELL)
    check = (cell * 0x9E3779B97F4A7C15 ^ write * 0xC2B2AE3D27D4EB4F ^ _MAGIC) & (1 << 64) - 1
    return _FORM.pack(_MAGIC, cell, write, check) * _REPEATS


def content(first, count, write):
    """Bytes of `count` cells from `first` on."""
    return b"".join(cell_content(cell, write) for cell in range(first, first + count))


class ForeignBytes(Exception):
    """A cell holds what no write ever put there."""


def writes_in(first, data):
    """Which write each cell of `data` came from; `first` is its first cell's number."""
    found = []
    for index in range(len(data) // CELL):
        part = data[index * CELL:(index + 1) * CELL]
        if part == _ZEROS:
            found.append(0)
            continue
        magic, cell, write, _ = _FORM.unpack_from(part)
        if part != cell_content(first + index, write) or write == 0:
            raise ForeignBytes(
                f"cell {first + index}: " + (
                    f"names cell {cell}, write {name(write)}, or is torn" if magic == _MAGIC
                    else f"foreign bytes {bytes(part[:32]).hex()}"))
        found.append(write)
    return found


_ZEROS = bytes(CELL)


def write_id(worker, counter):
    return worker + 1 << 40 | counter


def name(write):
    """How messages call a write."""
    return "zeros" if write == 0 else f"w{(write >> 40) - 1}.{write & (1 << 40) - 1}"
