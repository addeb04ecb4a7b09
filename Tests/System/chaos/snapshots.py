"""An administrator at work beside clients and faults: snapshots taken, deleted and gone back to.

One request at a time, asked again until its outcome is known, or given up in doubt: what is true
then is told by the record at the end of the round, or what the volume and its snapshots hold is
judged for both.
"""

import contextlib
import random
import threading
import time

import nbd

from harness.cluster import ControlError, control

from .checker import Violation
from .copies import compare_snapshot
from .data import BLOCK
from .workers import CONNECTION_ERRORS, HOT_BLOCKS

SNAPSHOTS_MAX = 6
ANSWER_MAX = 90.0  # seconds
# What an engine's refusal says when nobody knows whether it happened, or somebody else does.
DOUBTS = ("is not known", "before it knew", "hung up")
DONE, REFUSED, DOUBT = "done", "refused", "doubt"
TAKE, DELETE, REVERT = "taken", "deleted", "reverted"


class Administrator:
    """`begin` and `finish` a round of it, `compare` what is there at rest."""

    def __init__(self, volume, seed):
        self.volume, self.checker = volume, volume.checker
        self.random = random.Random(seed)
        self.names = []  # of snapshots that are there, oldest first
        self.doubtful = []  # asked for in vain
        self.leaving = []  # names whose deletion is in doubt
        self.unread = []
        self.counts = dict.fromkeys(
            (TAKE, DELETE, REVERT, "given up", "looked at", "compared"), 0)
        self.plan = []
        self.failure = None
        self._serial = 0
        self._stop, self._rest = threading.Event(), threading.Event()
        self._thread = None

    # A round

    def begin(self, plan=()):
        """`plan`: what to do first, until each is done: `TAKE`, `DELETE` or `REVERT`."""
        self.plan = list(plan)
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def at_rest(self):
        """Begins nothing: each snapshot and revert costs a replica on its way back some time."""
        self._rest.set()
        try:
            yield
        finally:
            self._rest.clear()

    @property
    def is_at_work(self):
        return self._thread is not None

    def finish(self, timeout=ANSWER_MAX):
        """No faults are left, so what is asked for is answered in time."""
        if not self.is_at_work:
            return
        self._stop.set()
        self._thread.join(timeout)
        assert not self._thread.is_alive(), f"the administrator waits in vain: {self._asked}"
        self._thread = None
        if self.failure:
            raise self.failure

    def leave(self):
        """The volume goes; so does whoever waits for it."""
        self._stop.set()
        self._is_gone = True
        if self._thread:
            self._thread.join(10)

    _is_gone = False
    _asked = "nothing"

    def _run(self):
        try:
            while not self._stop.wait(self.random.choice((0.02, 0.1, 0.5, 1))):
                if not self._rest.is_set():
                    self._act()
        except BaseException as error:  # the thread's end must not be silent
            self.failure = error

    def _act(self):
        if self.unread:
            return self._look(self.unread.pop(0))
        if self.plan:
            before = self.counts[self.plan[0]]
            {TAKE: self._take, DELETE: self._delete, REVERT: self._revert}[self.plan[0]]()
            if self.counts[self.plan[0]] > before:
                self.plan.pop(0)
            return
        actions, weights = zip(
            (self._take, 50), (self._delete, 20), (self._revert, 12), (self._look, 10))
        self.random.choices(actions, weights)[0]()

    # What it does

    def _take(self):
        if len(self.names) + len(self.doubtful) >= SNAPSHOTS_MAX:
            return self._delete()
        snapshot = self.checker.begin_snapshot(self._name("s"))
        self._settle(snapshot, self._ask("snapshot", name=snapshot.name, created=_now()), TAKE)

    def _delete(self):
        targets = {snapshot.target for snapshot in self.doubtful}
        names = [name for name in self.names if name not in targets]
        if not names:
            return
        name = self.random.choice(names)
        self.names.remove(name)
        if name in self.unread:
            self.unread.remove(name)
        outcome = self._ask("delete-snapshot", name=name)
        self.volume.note(f"deletion of snapshot {name}: {outcome}")
        if outcome == DONE:
            self.counts[DELETE] += 1
            self.checker.forget_snapshot(name)
        else:
            self.leaving.append(name)

    def _revert(self):
        """Clients go, since what they remember would be wrong, and others come."""
        if len(self.names) + len(self.doubtful) >= SNAPSHOTS_MAX:
            return self._delete()
        if not self.names:
            return
        target = self.random.choice(self.names)
        with self.volume.without_clients():
            if not self._is_deserted():
                return
            snapshot = self.checker.begin_snapshot(self._name("kept"), target)
            outcome = self._ask("revert", snapshot=target, keep=snapshot.name, created=_now())
            self._settle(snapshot, outcome, REVERT)

    def _is_deserted(self):
        """The engine has heard of the last client's end; behind a partition it may not."""
        end = time.monotonic() + 3
        while time.monotonic() < end:
            if self.volume.status().get("connections") == "0":
                return True
            time.sleep(0.02)
        return False

    def _settle(self, snapshot, outcome, what):
        if outcome == DONE:
            self.counts[what] += 1
            self.checker.finish_snapshot(snapshot)
            self.names.append(snapshot.name)
            self.unread.append(snapshot.name)
        elif outcome == REFUSED:
            self.checker.deny_snapshot(snapshot)
        else:
            self.counts["given up"] += 1
            self.doubtful.append(snapshot)
        self.volume.note(f"{snapshot!r}: {outcome}")

    def _look(self, name=None):
        """Reads, as a client, what a snapshot holds where most is written."""
        name = name or (self.random.choice(self.names) if self.names else None)
        if name is None:
            return
        handle = nbd.NBD()
        handle.set_export_name(f"volume@{name}")
        with contextlib.suppress(nbd.Error):
            handle.connect_unix(str(self.volume.cluster.engine.unix))
        if not handle.aio_is_ready():
            return  # no engine just now; it is read at the end of the round
        try:
            data = handle.pread(HOT_BLOCKS * BLOCK, 0)
            handle.shutdown()
        except nbd.Error as error:
            # 0: libnbd's, when the engine died in the middle of its reply.
            if error.errnum not in (0, *CONNECTION_ERRORS):
                raise Violation(f"a read of snapshot {name} was answered with {error}") from None
            return
        self.counts["looked at"] += 1
        for block in range(HOT_BLOCKS):
            self.checker.saw(name, block, data[block * BLOCK:(block + 1) * BLOCK])

    def _name(self, kind):
        self._serial += 1
        return f"{kind}-{self._serial}"

    # Asking

    def _ask(self, verb, **arguments):
        """Whether it happened. One that may or may not have is asked again, or given up."""
        outcome, patience = REFUSED, self.random.choice((0.3, 2, 8))
        self._asked = f"{verb} {arguments}"
        while not self._is_gone:
            # Without faults it is answered at once: then nothing but an answer will do.
            timeout = 60 if self._stop.is_set() else patience
            try:
                control(self.volume.cluster.engine.control, verb, timeout, **arguments)
                return DONE
            except (FileNotFoundError, ConnectionRefusedError):
                pass  # nobody was asked
            except ControlError as error:
                if any(text in str(error) for text in DOUBTS):
                    outcome = DOUBT
                elif "the volume is in use" in str(error):
                    return outcome
                elif not any(text in str(error) for text in ("try again", "is in use")):
                    raise AssertionError(f"{self._asked}: {error}") from None
            except OSError:
                outcome = DOUBT
            # One in doubt at a time: the checker has to think of every combination.
            if outcome == DOUBT and not self.doubtful and self.random.random() < 0.2:
                return DOUBT
            self._stop.wait(0.05)
            if self._stop.is_set():
                time.sleep(0.05)
        return outcome

    # The end of a round

    def compare(self, record, size, replicas):
        """No process is left: what the record says is true, and all copies hold all of it."""
        there = {name for _, _, name in record.snapshots}
        for snapshot in self.doubtful:
            if snapshot.name in there:
                self.checker.finish_snapshot(snapshot)
                self.names.append(snapshot.name)
            else:
                self.checker.deny_snapshot(snapshot)
        for name in self.leaving:
            if name in there:
                self.names.append(name)
            else:
                self.checker.forget_snapshot(name)
        self.doubtful, self.leaving, self.unread = [], [], []
        assert there == set(self.names), f"snapshots {there}, should be {set(self.names)}"
        for name in self.names:
            compare_snapshot(self.checker, name, size, replicas)
            self.counts["compared"] += 1

    def __str__(self):
        return ", ".join(f"{count} {what}" for what, count in self.counts.items() if count)


def _now():
    return int(time.time() * 1000)
