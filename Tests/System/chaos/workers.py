"""Clients that never give up: random requests, repeated on a new connection until answered."""

import contextlib
import os
import random
import sys
import threading
import time

import nbd

from .checker import READ, WRITE, Violation
from .data import CELL, CELLS, content, write_id
from .network import abort

CONNECTION_ERRORS = (32, 103, 104, 107, 108, 110, 111)  # EPIPE ... ECONNREFUSED, ESHUTDOWN
HOT_BLOCKS = 48
SIZES = (  # cells, and how often
    (8, 40), (1, 6), (3, 6), (5, 4), (11, 6), (16, 10), (32, 8), (61, 4), (128, 3), (600, 1))
DEPTH_ON_A_BLOCK = 4

sys.setswitchinterval(0.0005)  # else each answer waits for the other clients' turns


class Job:
    """A request with all its attempts."""

    __slots__ = ("command", "first", "count", "write", "attempts", "reading", "buffer", "flags")

    def __init__(self, command, first, count, write, flags):
        self.command, self.first, self.count = command, first, count
        self.write, self.flags = write, flags
        self.attempts, self.reading, self.buffer = [], None, None


class Worker:
    """One client with one connection at a time, in its own thread.

    `address`: a Unix socket's path, or (host, port). Answers must come within `patience` seconds,
    else it tries a new connection, as it does when the old one breaks.
    """

    def __init__(self, checker, number, address, cells, seed, inside=contextlib.nullcontext,
                 depth=8, patience=15.0):
        self.checker, self.number, self.address, self.cells = checker, number, address, cells
        self.random = random.Random(seed)
        self.inside, self.depth, self.patience = inside, depth, patience
        self.completed = self.reconnects = self.retries = self.retried_blocks = 0
        self.longest_gap = 0.0
        self.last_answer = time.monotonic()
        self.failure = None
        self._counter = 0
        self._unanswered = {}
        self._broken = False
        self._stop, self._crash = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self):
        self._thread.start()
        return self

    def stop(self, timeout=120.0):
        """Waits until everything is answered."""
        self.ask_to_stop()
        assert self.has_stopped(timeout), (
            f"client {self.number} waits in vain for {len(self._unanswered)} answers: {self.state}")
        if self.failure:
            raise self.failure

    def ask_to_stop(self):
        self._stop.set()

    def has_stopped(self, timeout):
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def crash(self):
        """It dies: nothing is repeated. Its attempts that nobody answered."""
        self._crash.set()
        self._thread.join(30)
        assert not self._thread.is_alive()
        if self.failure:
            raise self.failure
        return [a for job in self._unanswered.values() for a in job.attempts
                if a.kind == WRITE]

    @property
    def state(self):
        return (f"{self.completed} answered, {self.reconnects} reconnects, "
                f"{self.retries} retries")

    def _run(self):
        try:
            while not self._crash.is_set() and not (self._stop.is_set() and not self._unanswered):
                self._session()
        except Violation as violation:
            self.failure = violation
        except Exception as error:  # the thread's end must not be silent
            self.failure = AssertionError(f"client {self.number}: {error!r}")

    def _session(self):
        handle = nbd.NBD()
        handle.set_export_name("volume")
        try:
            with self.inside():
                if isinstance(self.address, tuple):
                    handle.connect_tcp(self.address[0], str(self.address[1]))
                else:
                    handle.connect_unix(str(self.address))
        except nbd.Error:
            self._crash.wait(0.02)
            return
        self._broken = False
        self._wait_from = time.monotonic()
        try:
            for job in list(self._unanswered.values()):
                self.retries += 1
                if job.write is not None:
                    self.retried_blocks += (job.first + job.count - 1) // CELLS - \
                        job.first // CELLS + 1
                self._send(handle, job)
            while not self._broken and not self._crash.is_set():
                while len(self._unanswered) < self.depth and not self._stop.is_set():
                    job = self._draw()
                    if job is None:
                        break
                    self._unanswered[id(job)] = job
                    self._send(handle, job)
                if self._stop.is_set() and not self._unanswered:
                    break
                handle.poll(20)
                if self.failure:
                    raise self.failure
                if time.monotonic() - self._wait_from > self.patience and self._unanswered:
                    break
        except nbd.Error:
            pass
        self._broken = True
        self.reconnects += 1
        with contextlib.suppress(nbd.Error, OSError):
            abort(handle.aio_get_fd())
        del handle  # closes it
        for job in self._unanswered.values():
            if job.reading:
                self.checker.abandon_read(job.reading)
                job.reading = None
        if self.failure:
            raise self.failure

    def _draw(self):
        """A new job, nil if its place is too busy just now."""
        dice = self.random.random()
        if dice < 0.02:
            return Job("flush", 0, 0, None, 0)
        count = self.random.choices([s for s, _ in SIZES], [w for _, w in SIZES])[0]
        limit = HOT_BLOCKS * CELLS if self.random.random() < 0.25 else self.cells
        first = self.random.randrange(max(limit - count, 1))
        if count % CELLS == 0 or dice > 0.97:
            first -= first % CELLS
        if self.checker.under_way(first, count) > DEPTH_ON_A_BLOCK:
            return None
        if dice < 0.40:
            return Job("read", first, count, None, 0)
        flags = nbd.CMD_FLAG_FUA if self.random.random() < 0.05 else 0
        if dice > 0.97:
            return Job("trim", first, (count + CELLS - 1) // CELLS * CELLS, 0, flags)
        if dice > 0.92:
            keeps = nbd.CMD_FLAG_NO_HOLE if self.random.random() < 0.5 else 0
            return Job("zero", first, count, 0, flags | keeps)
        self._counter += 1
        return Job("write", first, count, write_id(self.number, self._counter), flags)

    def _send(self, handle, job):
        offset, length = job.first * CELL, job.count * CELL
        attempt = None
        if job.command == "read":
            attempt = job.reading = self.checker.begin(READ, job.first, job.count)
            job.buffer = bytearray(length)  # see Workload
        elif job.command != "flush":
            attempt = self.checker.begin(
                WRITE, job.first, job.count, job.write, job.attempts[-1] if job.attempts else None)
            job.attempts.append(attempt)
        if job.command == "write":
            job.buffer = content(job.first, job.count, job.write)
        done = self._done(job, attempt)
        if job.command == "read":
            handle.aio_pread(job.buffer, offset, done)
        elif job.command == "write":
            handle.aio_pwrite(job.buffer, offset, done, job.flags)
        elif job.command == "trim":
            handle.aio_trim(length, offset, done, job.flags)
        elif job.command == "zero":
            handle.aio_zero(length, offset, done, job.flags)
        else:
            handle.aio_flush(done)

    def _done(self, job, attempt):
        buffer = job.buffer

        def done(error):
            if self._broken:  # an earlier session's
                return 1
            number = error.value if hasattr(error, "value") else error
            try:
                if number == 0:
                    self._answered(job, attempt, buffer)
                else:
                    if number not in CONNECTION_ERRORS:
                        raise Violation(
                            f"client {self.number}: {job.command} at cell {job.first} answered "
                            f"with {os.strerror(number)}")
                    self._broken = True
            except BaseException as failure:
                self.failure = self.failure or failure
            return 1
        return done

    def _answered(self, job, attempt, buffer):
        del self._unanswered[id(job)]
        now = time.monotonic()
        self.longest_gap = max(self.longest_gap, now - self.last_answer)
        self.last_answer = self._wait_from = now
        self.completed += 1
        if job.command == "read":
            self.checker.finish_read(attempt, bytes(buffer))
        elif job.command != "flush":
            self.checker.finish_write(attempt, job.attempts[:-1])
