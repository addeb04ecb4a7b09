"""The copies of a volume that nobody serves any more, and what they must hold."""

from harness.cluster import MIB

from .checker import READ
from .data import BLOCK, CELLS, name, writes_in


def compare(checker, size, images):
    """Byte for byte with each other; block by block with what the history allows."""
    touched = set(checker.touched())
    for start in range(0, size, MIB):
        parts = [image.read(MIB) for image in images]
        if any(part != parts[0] for part in parts):
            _explain(checker, start, parts)
        for offset in range(0, MIB, BLOCK):
            block, data = (start + offset) // BLOCK, parts[0][offset:offset + BLOCK]
            if block in touched:
                attempt = checker.begin(READ, block * CELLS, CELLS)
                checker.finish_read(attempt, data)
            else:
                assert not any(data), f"block {block} was never written, and is not zero"
    assert all(not image.read(1) for image in images), "an export is too long"


def _explain(checker, start, parts):
    lines = []
    for offset in range(0, MIB, BLOCK):
        copies = [part[offset:offset + BLOCK] for part in parts]
        if len(set(copies)) > 1:
            block = (start + offset) // BLOCK
            lines.append(f"copies differ in block {block}: " + " | ".join(
                " ".join(map(name, writes_in(block * CELLS, copy))) for copy in copies))
            lines += [f"  {e} {r!r}" for e, r in checker.blocks[block].log]
    raise AssertionError("\n".join(lines))
