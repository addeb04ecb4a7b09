"""The copies of a volume that nobody serves any more, and what they must hold."""

import contextlib

from harness.cluster import MIB

from .checker import READ
from .data import BLOCK, CELLS, name, writes_in


def compare(checker, size, images):
    """Byte for byte with each other; block by block with what the history allows."""
    def judge(block, data):
        attempt = checker.begin(READ, block * CELLS, CELLS)
        checker.finish_read(attempt, data)
    compare_images(checker, size, images, judge)


def compare_replicas(checker, size, replicas):
    """The same of what these export."""
    with _images(replicas) as images:
        compare(checker, size, images)


def compare_snapshot(checker, snapshot, size, replicas):
    """The same of what a snapshot holds."""
    with _images(replicas, snapshot) as images:
        compare_snapshot_images(checker, snapshot, size, images)


def compare_snapshot_images(checker, snapshot, size, images):
    values = {}

    def judge(block, data):
        cells = checker.saw(snapshot, block, data)
        values.update((block * CELLS + i, write) for i, write in enumerate(cells) if write)
    compare_images(checker, size, images, judge, f"snapshot {snapshot}: ")
    checker.judge_cut(snapshot, values)


@contextlib.contextmanager
def _images(replicas, snapshot=None):
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(replica.export(snapshot)) for replica in replicas]


def compare_images(checker, size, images, judge, what=""):
    """`judge(block, data)` says whether the history allows that; of blocks it knows nothing of,
    zeros are expected."""
    touched = set(checker.touched())
    for start in range(0, size, MIB):
        parts = [image.read(MIB) for image in images]
        if any(part != parts[0] for part in parts):
            _explain(checker, start, parts, what)
        for offset in range(0, MIB, BLOCK):
            block, data = (start + offset) // BLOCK, parts[0][offset:offset + BLOCK]
            if block in touched:
                judge(block, data)
            else:
                assert not any(data), f"{what}block {block} was never written, and is not zero"
    assert all(not image.read(1) for image in images), f"{what}an export is too long"


def _explain(checker, start, parts, what):
    lines = []
    for offset in range(0, MIB, BLOCK):
        copies = [part[offset:offset + BLOCK] for part in parts]
        if len(set(copies)) > 1:
            block = (start + offset) // BLOCK
            lines.append(f"{what}copies differ in block {block}: " + " | ".join(
                " ".join(map(name, writes_in(block * CELLS, copy))) for copy in copies))
            if block in checker.blocks:
                lines += [f"  {e} {r!r}" for e, r in checker.blocks[block].log]
    raise AssertionError("\n".join(lines))
