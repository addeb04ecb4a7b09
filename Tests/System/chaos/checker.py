"""Is what the clients saw legal? Exact, per 4 KiB block, while the run goes on.

A block is a register of eight cells. Each request on it must seem to happen at one instant between
its begin and its end (linearizability), whole: a write changes all its cells of the block at once.
Blocks are independent, so they are judged one by one.

The checker keeps every *configuration* of a block that the history so far allows: the cells, which
of the requests under way have happened already, and what each snapshot holds of the block. When a
request ends, each configuration is
advanced through every order of the requests under way that ends with this one; those where it
cannot have happened are dropped. None left: the history is illegal. This is a complete search, not
a heuristic: it accepts every legal history and refuses every other.

Crash semantics. An attempt at a write that was not answered stays under way: it may happen at any
later instant, once, or never. A retry is a further attempt of the same write; when it is answered,
the earlier ones can no longer happen (what was held from an old connection is fenced or drained
before the new one is served). `fence` says that nobody is left who could carry an attempt out.
Acknowledged writes never vanish, flushed or not. No fault here takes power from a host: data is
written with O_DIRECT and the log through a shared mapping, so both are with the kernel before a
reply goes out, and a killed process takes nothing of them with it.

Snapshots. Taking one is a request on every block, which keeps the cells of one instant between its
begin and its end; going back to one makes the cells what that holds, and keeps what they were under
another name. What a snapshot holds is learnt when it is read, any time later (`saw`), and must be
what some configuration says: so it agrees with the reads and the other snapshots too. A request in
doubt stays under way until somebody finds out (`finish_snapshot`, `deny_snapshot`). That all blocks
are of the same instant is judged from what was answered before what else was begun (`judge_cut`).

The window is small: a block keeps its configurations and its requests under way. While a read is
under way its block's events wait, since what it saw is not known yet.
"""

import threading
from collections import deque

from .data import CELLS, ForeignBytes, writes_in
from .data import name as word

READ, WRITE, SNAPSHOT = 0, 1, 2
SEARCH_MAX = 300_000  # configurations; a block has a handful unless the harness is wrong


class Violation(AssertionError):
    """The volume did what it must never do."""


class Request:
    """One attempt at one request. `values`, of a read: what each of its cells held.

    Attempts at one write are alike, so `earlier` ones are said to happen first: fewer orders to try.
    """

    __slots__ = ("kind", "first", "count", "write", "earlier", "values", "state")
    WAITING, KNOWN, DROPPED = range(3)

    def __init__(self, kind, first, count, write=None, earlier=None):
        self.kind, self.first, self.count, self.write = kind, first, count, write
        self.earlier = earlier
        self.values = None
        self.state = Request.WAITING

    def cells_in(self, block):
        low = max(self.first, block * CELLS) - block * CELLS
        high = min(self.first + self.count, (block + 1) * CELLS) - block * CELLS
        return low, high

    def __repr__(self):
        span = f"cells {self.first}+{self.count}"
        if self.kind == WRITE:
            return f"write {word(self.write)} {span}"
        seen = "?" if self.values is None else " ".join(word(v) for v in self.values[:CELLS])
        return f"read {span} -> {seen}"


class Snapshot:
    """A request for a snapshot called `name`; with `target`, by going back to the one of that name.

    An event on every block, so it has what a `Request` has.
    """

    __slots__ = ("name", "target", "kind", "state", "earlier", "near", "is_one_line")

    def __init__(self, name, target=None):
        self.name, self.target = name, target
        self.near = []  # (write, first, count) of those answered while it was under way
        self.is_one_line = target is None  # and nobody went back to another one meanwhile
        self.kind, self.state, self.earlier = SNAPSHOT, Request.KNOWN, None

    def __repr__(self):
        back = f", back to {self.target}" if self.target else ""
        return f"snapshot {self.name}{back}"


class Sight:
    """What a snapshot was seen to hold of a block."""

    __slots__ = ("name", "cells", "kind", "state")

    def __init__(self, name, cells):
        self.name, self.cells = name, cells
        self.kind, self.state = SNAPSHOT, Request.KNOWN

    def __repr__(self):
        return f"{self.name} holds {' '.join(map(word, self.cells))}"


class Block:
    __slots__ = ("number", "configurations", "open", "events", "log")
    NOTHING = frozenset()
    ZEROS = (0,) * CELLS

    def __init__(self, number, snapshots=(), pending=()):
        """Zeros up to now. `snapshots`: names of those there are; `pending`: those under way."""
        self.number = number
        kept = frozenset((name, Block.ZEROS) for name in snapshots)
        # The cells, ids of open requests that have happened, and (name, cells) of each snapshot.
        self.configurations = {(Block.ZEROS, Block.NOTHING, kept)}
        self.open = {id(request): request for request in pending}
        self.events = deque()  # not judged yet: a read before them is not known
        self.log = deque(maxlen=40)

    def add(self, event, request):
        self.events.append((event, request))
        self.drain()

    def drain(self):
        while self.events:
            event, request = self.events[0]
            if event == "begin" and request.kind == READ and request.state == Request.WAITING:
                return
            self.events.popleft()
            self.log.append((event, request))
            if request.state == Request.DROPPED:
                continue  # a read nobody saw the end of
            if event == "begin":
                self.open[id(request)] = request
            else:
                getattr(self, "_" + event)(request)

    def _end(self, request):
        key = id(request)
        survivors = set()
        for cells, done, kept in self.configurations:
            if key in done:
                survivors.add((cells, done - {key}, kept))
            else:
                self._advance((cells, done, kept), request, survivors)
        del self.open[key]
        self._narrow(survivors, request)

    def _narrow(self, survivors, request):
        if not survivors:
            raise Violation(self._explain(request))
        self.configurations = survivors

    def _advance(self, configuration, last, survivors):
        """Adds every way in which `last` happens, after any others under way in any order."""
        seen, stack = {configuration}, [configuration]
        while stack:
            cells, done, kept = stack.pop()
            after = self._apply(cells, kept, last)
            if after is not None:
                survivors.add((after[0], done, after[1]))
            for key, request in self.open.items():
                if key in done or request is last:
                    continue
                before = id(request.earlier)
                if before in self.open and before not in done:
                    continue
                after = self._apply(cells, kept, request)
                if after is None:
                    continue
                next_one = (after[0], done | {key}, after[1])
                if next_one not in seen:
                    seen.add(next_one)
                    stack.append(next_one)
            if len(seen) > SEARCH_MAX:
                raise RuntimeError(
                    f"block {self.number}: too many requests at once to judge: {self.open}")

    def _apply(self, cells, kept, request):
        """The cells and what snapshots hold after it, nil if it cannot happen now."""
        if request.kind == SNAPSHOT:
            after = cells if request.target is None else dict(kept).get(request.target)
            return after and (after, kept | {(request.name, cells)})
        low, high = request.cells_in(self.number)
        if request.kind == WRITE:
            return cells[:low] + (request.write,) * (high - low) + cells[high:], kept
        start = self.number * CELLS + low - request.first
        seen = tuple(request.values[start:start + high - low])
        return (cells, kept) if seen == cells[low:high] else None

    def _fence(self, request):
        """It happened already or never will."""
        key = id(request)
        if self.open.pop(key, None) is None:
            return
        self.configurations = {(c, d - {key}, k) for c, d, k in self.configurations}

    def _deny(self, request):
        """It has not happened, and never will."""
        key = id(request)
        del self.open[key]
        self._narrow({c for c in self.configurations if key not in c[1]}, request)

    def _saw(self, sight):
        held = (sight.name, sight.cells)
        self._narrow({c for c in self.configurations if held in c[2]}, sight)

    def _forget(self, request):
        """The snapshot is deleted."""
        self.configurations = {
            (cells, done, frozenset(held for held in kept if held[0] != request.name))
            for cells, done, kept in self.configurations}

    def _explain(self, request):
        lines = [f"block {self.number}: {request!r} fits no legal order"]
        if request.kind == READ:
            low, high = request.cells_in(self.number)
            start = self.number * CELLS + low - request.first
            lines.append(f"seen here, from cell {low} on: " + " ".join(
                map(word, request.values[start:start + high - low])))
        if isinstance(request, Sight):
            legal = {cells for _, _, kept in self.configurations
                     for held, cells in kept if held == request.name}
        else:
            legal = {cells for cells, _, _ in self.configurations}
        lines += ["legal contents before: " + " | ".join(
            " ".join(word(w) for w in cells) for cells in list(legal)[:4])]
        lines += [f"under way: {other!r}" for other in self.open.values()]
        lines += [f"  {event} {other!r}" for event, other in self.log]
        return "\n".join(lines)


class Checker:
    """The history of a volume from its creation on. Every call is safe from any thread."""

    def __init__(self):
        self.lock = threading.Lock()
        self.blocks = {}
        self.snapshots = {}  # by name, those that are there
        self.pending = []  # those that may be
        self.clock = 0
        self.times = {}  # write -> when it was begun first, when answered or nil
        self.violation = None
        self.judged = 0

    def begin(self, kind, first, count, write=None, earlier=None):
        """Before it is sent. `write` is 0 for trims and zeroes."""
        request = Request(kind, first, count, write, earlier)
        with self.lock:
            if write:
                self.times.setdefault(write, [self._tick(), None])
            for block in self._blocks(request):
                block.add("begin", request)
        return request

    def finish_write(self, request, others=()):
        """It was answered; `others` are earlier attempts of the same write."""
        with self.lock:
            for block in self._blocks(request):
                self._judge(block, "end", request)
                for other in others:
                    self._judge(block, "fence", other)
            if request.write:
                self.times[request.write][1] = self._tick()
                for snapshot in self.pending:
                    snapshot.near.append((request.write, request.first, request.count))
            self.judged += 1

    def _tick(self):
        self.clock += 1
        return self.clock

    def finish_read(self, request, data):
        with self.lock:
            try:
                request.values = writes_in(request.first, data)
            except ForeignBytes as error:
                self.violation = self.violation or Violation(f"{request!r}: {error}")
                raise self.violation from None
            request.state = Request.KNOWN
            for block in self._blocks(request):
                block.events.append(("end", request))
                self._drain(block)
            self.judged += 1

    def abandon_read(self, request):
        """Its answer never came, or is of no interest."""
        with self.lock:
            request.state = Request.DROPPED
            for block in self._blocks(request):
                self._drain(block)

    def fence(self, requests):
        """Nobody is left who could still carry these out."""
        with self.lock:
            for request in requests:
                for block in self._blocks(request):
                    self._judge(block, "fence", request)

    def fence_all(self):
        """The engine and every client are gone: what was not answered happened or never will."""
        with self.lock:
            for block in self.blocks.values():
                for request in list(block.open.values()):
                    if request.kind == WRITE:
                        self._judge(block, "fence", request)

    def begin_snapshot(self, name, target=None):
        """Before it is asked for. `target`: that of the snapshot to go back to."""
        snapshot = Snapshot(name, target)
        with self.lock:
            self.pending.append(snapshot)
            if any(other.target for other in self.pending):
                for other in self.pending:
                    other.is_one_line = False
            for block in self.blocks.values():
                block.add("begin", snapshot)
        return snapshot

    def finish_snapshot(self, snapshot):
        """It was answered, or is known to be there."""
        with self.lock:
            self.pending.remove(snapshot)
            self.snapshots[snapshot.name] = snapshot
            self._judge_all("end", snapshot)

    def deny_snapshot(self, snapshot):
        """It was not taken and never will be."""
        with self.lock:
            self.pending.remove(snapshot)
            self._judge_all("deny", snapshot)

    def forget_snapshot(self, name):
        """It was deleted."""
        with self.lock:
            self._judge_all("forget", self.snapshots.pop(name))

    def saw(self, name, number, data):
        """A block of a snapshot was read; the writes in it."""
        with self.lock:
            try:
                sight = Sight(name, tuple(writes_in(number * CELLS, data)))
            except ForeignBytes as error:
                self.violation = self.violation or Violation(f"snapshot {name}: {error}")
                raise self.violation from None
            self._judge(self._block(number), "saw", sight)
            self.judged += 1
            return sight.cells

    def judge_cut(self, name, values):
        """All of a snapshot is of one instant. `values`: the write in each of its cells but zeros.

        That instant is after the begin of every write that is in it, and before the answer of every
        one that is not, since a cell of it holds what was answered before that one was begun.
        """
        with self.lock:
            snapshot, nobody = self.snapshots[name], (0, None)
            if not snapshot.is_one_line or not values:
                return
            last = max(values.values(), key=lambda write: self.times[write][0])
            for write, first, count in snapshot.near:
                begun, answered = self.times[write]
                if answered > self.times[last][0]:
                    continue
                for cell in range(first, first + count):
                    seen = values.get(cell, 0)
                    if (self.times.get(seen, nobody)[1] or begun) < begun:
                        self.violation = self.violation or Violation(
                            f"{snapshot!r} has not {word(write)} (cell {cell}), which "
                            f"was answered before {word(last)} was begun, which it has")
                        raise self.violation

    def _judge_all(self, event, request):
        for block in self.blocks.values():
            self._judge(block, event, request)

    def under_way(self, first, count):
        """How many requests one block of this range has under way, at most."""
        with self.lock:
            blocks = range(first // CELLS, (first + count - 1) // CELLS + 1)
            known = (self.blocks.get(number) for number in blocks)
            return max((len(b.open) + len(b.events) for b in known if b), default=0)

    def touched(self):
        """Numbers of the blocks that were ever written or read."""
        with self.lock:
            return sorted(self.blocks)

    def _blocks(self, request):
        last = (request.first + request.count - 1) // CELLS
        for number in range(request.first // CELLS, last + 1):
            yield self._block(number)

    def _block(self, number):
        block = self.blocks.get(number)
        if block is None:
            block = self.blocks[number] = Block(number, self.snapshots, self.pending)
        return block

    def _judge(self, block, event, request):
        block.events.append((event, request))
        self._drain(block)

    def _drain(self, block):
        try:
            block.drain()
        except Violation as violation:
            self.violation = self.violation or violation
            raise
