"""Is what the clients saw legal? Exact, per 4 KiB block, while the run goes on.

A block is a register of eight cells. Each request on it must seem to happen at one instant between
its begin and its end (linearizability), whole: a write changes all its cells of the block at once.
Blocks are independent, so they are judged one by one.

The checker keeps every *configuration* of a block that the history so far allows: the cells, and
which of the requests under way have happened already. When a request ends, each configuration is
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

The window is small: a block keeps its configurations and its requests under way. While a read is
under way its block's events wait, since what it saw is not known yet.
"""

import threading
from collections import deque

from .data import CELLS, ForeignBytes, name, writes_in

READ, WRITE = 0, 1
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
            return f"write {name(self.write)} {span}"
        seen = "?" if self.values is None else " ".join(name(v) for v in self.values[:CELLS])
        return f"read {span} -> {seen}"


class Block:
    __slots__ = ("number", "configurations", "open", "events", "log")
    NOTHING = frozenset()

    def __init__(self, number):
        self.number = number
        self.configurations = {((0,) * CELLS, Block.NOTHING)}
        self.open = {}  # id -> request
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
            elif event == "end":
                self._end(request)
            else:
                self._fence(request)

    def _end(self, request):
        key = id(request)
        survivors = set()
        for cells, done in self.configurations:
            if key in done:
                survivors.add((cells, done - {key}))
            else:
                self._advance(cells, done, request, survivors)
        del self.open[key]
        if not survivors:
            raise Violation(self._explain(request))
        self.configurations = survivors

    def _advance(self, cells, done, last, survivors):
        """Adds every way in which `last` happens, after any others under way in any order."""
        seen, stack = {(cells, done)}, [(cells, done)]
        while stack:
            cells, done = stack.pop()
            after = self._apply(cells, last)
            if after is not None:
                survivors.add((after, done))
            for key, request in self.open.items():
                if key in done or request is last:
                    continue
                before = id(request.earlier)
                if before in self.open and before not in done:
                    continue
                after = self._apply(cells, request)
                if after is None:
                    continue
                next_one = (after, done | {key})
                if next_one not in seen:
                    seen.add(next_one)
                    stack.append(next_one)
            if len(seen) > SEARCH_MAX:
                raise RuntimeError(
                    f"block {self.number}: too many requests at once to judge: {self.open}")

    def _apply(self, cells, request):
        """The cells after it, nil if it cannot happen now."""
        low, high = request.cells_in(self.number)
        if request.kind == WRITE:
            return cells[:low] + (request.write,) * (high - low) + cells[high:]
        start = self.number * CELLS + low - request.first
        seen = tuple(request.values[start:start + high - low])
        return cells if seen == cells[low:high] else None

    def _fence(self, request):
        """It happened already or never will."""
        key = id(request)
        if self.open.pop(key, None) is None:
            return
        self.configurations = {(c, d - {key}) for c, d in self.configurations}

    def _explain(self, request):
        lines = [f"block {self.number}: {request!r} fits no legal order"]
        if request.kind == READ:
            low, high = request.cells_in(self.number)
            start = self.number * CELLS + low - request.first
            lines.append(f"seen here, from cell {low} on: " + " ".join(
                map(name, request.values[start:start + high - low])))
        legal = {cells for cells, _ in self.configurations}
        lines += ["legal contents before: " + " | ".join(
            " ".join(name(w) for w in cells) for cells in list(legal)[:4])]
        lines += [f"under way: {other!r}" for other in self.open.values()]
        lines += [f"  {event} {other!r}" for event, other in self.log]
        return "\n".join(lines)


class Checker:
    """The history of a volume from its creation on. Every call is safe from any thread."""

    def __init__(self):
        self.lock = threading.Lock()
        self.blocks = {}
        self.violation = None
        self.judged = 0

    def begin(self, kind, first, count, write=None, earlier=None):
        """Before it is sent. `write` is 0 for trims and zeroes."""
        request = Request(kind, first, count, write, earlier)
        with self.lock:
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
            self.judged += 1

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
            block = self.blocks.get(number)
            if block is None:
                block = self.blocks[number] = Block(number)
            yield block

    def _judge(self, block, event, request):
        block.events.append((event, request))
        self._drain(block)

    def _drain(self, block):
        try:
            block.drain()
        except Violation as violation:
            self.violation = self.violation or violation
            raise
