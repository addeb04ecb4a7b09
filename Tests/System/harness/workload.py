"""A client that keeps its own history and believes nothing.

Every block carries its number and a version. Per block the history knows which values may be read:
the last one acknowledged, and any whose outcome is unknown because the connection was lost. When
the power of all members is lost at once, that is the last one flushed and any since, mixed by
sectors.
"""

import os
import random
import struct
import threading
import time

import nbd

BLOCK = 4096
SECTOR = 512
_MAGIC = 0x4841505445524121


def content(block, version):
    """What a block holds after the write `version`; version 0 is zeros."""
    if version == 0:
        return bytes(BLOCK)
    return struct.pack("<4Q", _MAGIC, block, version, block ^ version ^ _MAGIC) * (BLOCK // 32)


class History:
    """What each of the volume's first `blocks` blocks may hold."""

    def __init__(self, blocks):
        self.blocks = blocks
        self.acknowledged = [0] * blocks
        self.doubtful = [[] for _ in range(blocks)]  # in flight, or of unknown outcome
        self.flushed = [0] * blocks
        self.since = {}  # block -> versions issued since the flushed one, oldest first
        self.mixed = {}  # version -> what a block held that a cut of the power had torn
        self.zero_versions = set()
        self.next_version = 1
        self._answers = {}  # version -> how many writes were acknowledged before it

    def issue(self, first, count, is_zero):
        version = self.next_version
        self.next_version += 1
        if is_zero:
            self.zero_versions.add(version)
        for block in range(first, first + count):
            self.doubtful[block].append(version)
            self.since.setdefault(block, []).append(version)
        return version

    def acknowledge(self, first, count, version):
        self._answers[version] = len(self._answers)
        for block in range(first, first + count):
            self.acknowledged[block] = version
            self.doubtful[block] = []

    def begin_flush(self):
        """What `end_flush` wants to know: a flush covers what was acknowledged before it began."""
        return len(self._answers)

    def end_flush(self, mark):
        for block, versions in list(self.since.items()):
            covered = [i for i, v in enumerate(versions) if self._answers.get(v, mark) < mark]
            if covered:
                self._settle_flushed(block, versions[covered[-1]], versions[covered[-1] + 1:])

    def end_fua(self, first, count, version):
        """The write is acknowledged, and durable by itself."""
        for block in range(first, first + count):
            versions = self.since[block]
            self._settle_flushed(block, version, versions[versions.index(version) + 1:])

    def _settle_flushed(self, block, version, later):
        self.flushed[block] = version
        if later:
            self.since[block] = later
        else:
            del self.since[block]

    def cut_power(self):
        """What was not flushed may be gone. How many blocks that concerns."""
        for block, versions in self.since.items():
            self.acknowledged[block] = self.flushed[block]
            self.doubtful[block] = list(versions)
        return len(self.since)

    def check_after_cut(self, first, data):
        """As `check`, where blocks may be torn; what is there now is durable. How many were."""
        torn = 0
        for index in range(len(data) // BLOCK):
            block = first + index
            found = bytes(data[index * BLOCK:(index + 1) * BLOCK])
            candidates = [self.expected(block, v)
                          for v in [self.acknowledged[block]] + self.doubtful[block]]
            if block in self.since and found not in candidates and all(
                    any(found[at:at + SECTOR] == c[at:at + SECTOR] for c in candidates)
                    for at in range(0, BLOCK, SECTOR)):
                torn += 1
                version = self.issue(block, 1, False)
                self.mixed[version] = found
            self.check(block, found)
            if block in self.since:
                self._settle_flushed(block, self.acknowledged[block], [])
        return torn

    def expected(self, block, version):
        if version in self.mixed:
            return self.mixed[version]
        return content(block, 0 if version in self.zero_versions else version)

    def check(self, first, data, settles=True):
        """Checks what was read; what is seen once must stay, so the doubt is over."""
        for index in range(len(data) // BLOCK):
            block = first + index
            found = bytes(data[index * BLOCK:(index + 1) * BLOCK])
            candidates = [self.acknowledged[block]] + self.doubtful[block]
            matching = [v for v in candidates if self.expected(block, v) == found]
            if not matching:
                raise AssertionError(
                    f"block {block} holds {describe(found)}, legal are "
                    f"{[(v, 'zero' if v in self.zero_versions else 'data') for v in candidates]}")
            if settles:
                self.acknowledged[block] = matching[-1]
                self.doubtful[block] = []


def describe(found):
    if not any(found):
        return "zeros"
    magic, block, version, _ = struct.unpack_from("<4Q", found)
    if magic != _MAGIC:
        return f"foreign bytes {found[:16].hex()}"
    torn = "" if found == content(block, version) else ", torn"
    return f"block {block} version {version}{torn}"


def connect(place):
    """A new connection to the volume at a Unix socket's path, or at an NBD address."""
    handle = nbd.NBD()
    if str(place).startswith("nbd://"):
        handle.connect_uri(str(place))
    else:
        handle.set_export_name("volume")
        handle.connect_unix(str(place))
    return handle


class Workload:
    """Random writes, reads, trims, zeroes and flushes over one connection, in its own thread.

    `socket`: where the volume is, as `connect` takes it.
    """

    def __init__(self, history, socket, seed, depth=16, writes_only=False, flushes=0.01):
        """`flushes`: of all requests; twice as often, of the writes, one is flushed by itself."""
        self.history, self.socket, self.depth = history, str(socket), depth
        self.flush_chance = flushes
        self.random = random.Random(seed)
        self.writes_only = writes_only
        self.completed = self.flushes = 0
        self.longest_gap, self.longest_gap_at = 0.0, None
        self.error = None
        self.failure = None
        self._busy = set()
        self._in_flight = 0
        self._last = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self):
        self._thread.start()
        return self

    def stop(self):
        """Finishes what is in flight; raises what the history found. The client's error, if any."""
        self._stop.set()
        return self.join()

    def join(self):
        self._thread.join(120)
        assert not self._thread.is_alive(), "requests are stuck: the client never got its answers"
        if self.failure:
            raise self.failure
        return self.error

    def wait_completed(self, more, timeout=60.0):
        """Waits until `more` further requests are answered."""
        goal, deadline = self.completed + more, time.monotonic() + timeout
        while self.completed < goal:
            if self.failure:
                raise self.failure
            assert self._thread.is_alive(), f"the client stopped: {self.error}"
            assert time.monotonic() < deadline, "no progress"
            time.sleep(0.005)

    def reset_gap(self):
        self.longest_gap = 0.0

    @property
    def silence(self):
        """Seconds since the last answer, once there was one."""
        return time.monotonic() - self._last

    def _run(self):
        try:
            handle = connect(self.socket)
            self._last = time.monotonic()
            while self.error is None and not (self._stop.is_set() and self._in_flight == 0):
                while self._in_flight < self.depth and not self._stop.is_set():
                    if not self._submit(handle):
                        break
                handle.poll(100)
        except nbd.Error as error:
            self.error = self.error or error
        except AssertionError as failure:
            self.failure = failure

    def _submit(self, handle):
        count = self.random.choice((1, 1, 1, 1, 2, 5, 16, 64))
        first = self.random.randrange(self.history.blocks - count + 1)
        span = range(first, first + count)
        if not self._busy.isdisjoint(span):
            return self._in_flight == 0
        dice = 0.0 if self.writes_only else self.random.random()
        offset, length = first * BLOCK, count * BLOCK
        if dice < 0.62:
            version = self.history.issue(first, count, False)
            data = b"".join(content(b, version) for b in span)
            flags = nbd.CMD_FLAG_FUA if self.random.random() < 2 * self.flush_chance else 0
            self._begin(span)
            handle.aio_pwrite(data, offset, self._write_done(span, version, data, flags), flags)
        elif dice < 0.70:
            version = self.history.issue(first, count, True)
            self._begin(span)
            if dice < 0.66:
                handle.aio_trim(length, offset, self._write_done(span, version))
            else:
                handle.aio_zero(length, offset, self._write_done(span, version))
        elif dice < 1 - self.flush_chance:
            buffer = bytearray(length)  # what libnbd is given as a Buffer it never gives back
            self._begin(span)
            handle.aio_pread(buffer, offset, self._read_done(span, buffer))
        else:
            self._begin(())
            handle.aio_flush(self._flush_done(self.history.begin_flush()))
        return True

    def _begin(self, span):
        if self._in_flight == 0:
            self._last = time.monotonic()
        self._busy.update(span)
        self._in_flight += 1

    def _end(self, span, error):
        now = time.monotonic()
        self._in_flight -= 1
        self._busy.difference_update(span)
        if error:
            self.error = self.error or nbd.Error(os.strerror(error), error)
            return False
        if now - self._last > self.longest_gap:
            self.longest_gap, self.longest_gap_at = now - self._last, now
        self._last = now
        self.completed += 1
        return True

    def _write_done(self, span, version, data=None, flags=0):
        def done(error):
            _ = data  # libnbd reads it until now
            if self._end(span, error.value if hasattr(error, "value") else error):
                self.history.acknowledge(span.start, len(span), version)
                if flags & nbd.CMD_FLAG_FUA:
                    self.history.end_fua(span.start, len(span), version)
            return 1
        return done

    def _read_done(self, span, buffer):
        def done(error):
            if self._end(span, error.value if hasattr(error, "value") else error):
                try:
                    self.history.check(span.start, buffer)
                except AssertionError as failure:
                    self.failure = self.failure or failure
                    self._stop.set()
            return 1
        return done

    def _flush_done(self, mark):
        def done(error):
            if self._end((), error.value if hasattr(error, "value") else error):
                self.flushes += 1
                self.history.end_flush(mark)
            return 1
        return done


def check_all(history, socket):
    """Reads every block back; what is acknowledged must be there."""
    _read_all(history, socket, history.check)


def check_all_after_cut(history, socket):
    """The same when all members have lost power; how many blocks were torn."""
    return sum(_read_all(history, socket, history.check_after_cut))


def _read_all(history, socket, check):
    handle = connect(socket)
    step = 256
    checked = []
    for first in range(0, history.blocks, step):
        count = min(step, history.blocks - first)
        checked.append(check(first, handle.pread(count * BLOCK, first * BLOCK)))
    handle.shutdown()
    return checked


class SyncProbe:
    """How long an fdatasync of one block takes on the same disk in the same minutes, and how long
    this machine let a process that does nothing else wait."""

    _PAUSE = 0.01

    def __init__(self, directory):
        self.path = directory / "sync-probe"
        self.seconds = []
        self.longest_stall = 0.0
        self.stalls = []  # (when it ended, seconds), those worth telling
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self.path.unlink()

    def _run(self):
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        index, last = 0, time.monotonic()
        while not self._stop.wait(self._PAUSE):
            os.pwrite(descriptor, bytes(BLOCK), index % 64 * BLOCK)
            index += 1
            start = time.monotonic()
            os.fdatasync(descriptor)
            now = time.monotonic()
            self.seconds.append(now - start)
            stall, last = now - last - self._PAUSE, now
            self.longest_stall = max(self.longest_stall, stall)
            if stall > self._PAUSE:
                self.stalls.append((now, stall))
        os.close(descriptor)

    def reset_stall(self):
        self.longest_stall = 0.0

    def stall_near(self, moment):
        """The longest that ended within a second of it."""
        return max((s for at, s in self.stalls if abs(at - moment) < 1.0), default=0.0)

    def p99(self):
        ordered = sorted(self.seconds)
        return ordered[int(len(ordered) * 0.99)] if ordered else 0.0
