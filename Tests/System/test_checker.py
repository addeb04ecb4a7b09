"""The judge of the chaos runs, judged: wrong histories it must refuse, and random ones."""

import io
import itertools
import random

from chaos.checker import READ, WRITE, Checker, Violation
from chaos.copies import compare_snapshot_images
from chaos.data import BLOCK, CELL, CELLS, cell_content, content
from harness.cluster import MIB


class Script:
    """A history of one client per letter, in the order of the calls."""

    def __init__(self):
        self.checker = Checker()

    def write(self, write, first=0, count=CELLS):
        return self.checker.begin(WRITE, first, count, write)

    def done(self, request, others=()):
        self.checker.finish_write(request, others)

    def wrote(self, write, first=0, count=CELLS):
        self.done(self.write(write, first, count))

    def read(self, first=0, count=CELLS):
        return self.checker.begin(READ, first, count)

    def saw(self, request, *writes):
        """`writes`: of the cells in turn; one stands for all."""
        values = writes * request.count if len(writes) == 1 else writes
        self.checker.finish_read(request, b"".join(
            cell_content(request.first + i, w) for i, w in enumerate(values)))

    def reads(self, *writes, first=0, count=CELLS):
        self.saw(self.read(first, count), *writes)

    def ask(self, name, target=None):
        return self.checker.begin_snapshot(name, target)

    def taken(self, snapshot):
        self.checker.finish_snapshot(snapshot)

    def took(self, name, target=None):
        self.taken(self.ask(name, target))

    def is_of_one_instant(self, name, values):
        """`values`: by cell, where each block begins."""
        for cell, write in values.items():
            self.holds(name, write, block=cell // CELLS)
        self.checker.judge_cut(name, {
            cell + i: write for cell, write in values.items() for i in range(CELLS) if write})

    def holds(self, name, *writes, block=0):
        values = writes * CELLS if len(writes) == 1 else writes
        self.checker.saw(name, block, b"".join(
            cell_content(block * CELLS + i, w) for i, w in enumerate(values)))


def lost_write(s):
    s.wrote(1)
    s.reads(0)


def lost_second_write(s):
    s.wrote(1)
    s.wrote(2)
    s.reads(1)


def lost_part_of_a_block(s):
    s.wrote(1)
    s.wrote(2, 2, 3)
    s.reads(1)


def torn_write(s):
    s.write(1)  # never answered, but whole or not at all
    s.reads(1, 1, 1, 1, 0, 0, 0, 0)


def torn_between_two(s):
    s.write(1)
    s.write(2)
    s.reads(1, 1, 1, 1, 2, 2, 2, 2)


def back_in_time(s):
    s.write(1)
    s.reads(1)
    s.reads(0)


def unanswered_write_twice(s):
    s.write(1)
    s.reads(1)
    s.wrote(2)
    s.reads(1)


def late_copy_of_a_retried_write(s):
    old = s.write(1)
    s.done(s.write(1), [old])
    s.wrote(2)
    s.reads(1)


def fenced_write(s):
    old = s.write(1)
    s.checker.fence([old])
    s.reads(0)
    s.reads(1)


def trimmed_data_back(s):
    s.wrote(1)
    s.wrote(0)
    s.reads(1)


def two_readers_disagree(s):
    s.write(1)
    s.write(2)
    s.reads(1)
    s.reads(2)
    s.reads(1)


def read_after_its_end(s):
    read = s.read()
    s.saw(read, 0)
    s.wrote(1)
    s.reads(0)


def write_never_begun(s):
    s.reads(7)


def another_place(s):
    s.wrote(1, 0, 2 * CELLS)
    read = s.read()
    s.checker.finish_read(read, content(CELLS, CELLS, 1))


def flipped_bit(s):
    s.wrote(1)
    read, data = s.read(), bytearray(content(0, CELLS, 1))
    data[700] ^= 4
    s.checker.finish_read(read, bytes(data))


def half_a_cell(s):
    s.wrote(1)
    read = s.read()
    s.checker.finish_read(read, content(0, CELLS, 1)[:-CELL // 2] + bytes(CELL // 2))


# Snapshots.

def snapshot_without_what_was_acknowledged(s):
    s.wrote(1)
    s.took("a")
    s.wrote(2)
    s.holds("a", 0)


def snapshot_with_what_was_issued_later(s):
    s.wrote(1)
    s.took("a")
    s.wrote(2)
    s.holds("a", 2)


def snapshot_that_turned_out_to_be_there(s):
    s.wrote(1)
    asked = s.ask("a")
    s.wrote(2)
    s.taken(asked)
    s.holds("a", 0)


def torn_snapshot(s):
    s.wrote(1)
    s.write(2)
    s.took("a")
    s.holds("a", 1, 1, 1, 1, 2, 2, 2, 2)


def older_part_in_a_snapshot(s):
    s.wrote(1)
    s.wrote(2, 0, 4)
    s.took("a")
    s.holds("a", 1)


def write_seen_in_a_snapshot_only(s):
    s.write(1)
    s.took("a")
    s.holds("a", 1)
    s.reads(0)


def write_read_before_a_snapshot_without_it(s):
    s.write(1)
    s.reads(1)
    s.took("a")
    s.holds("a", 0)


def snapshots_in_the_wrong_order(s):
    s.write(1)
    s.took("a")
    s.took("b")
    s.holds("b", 0)
    s.holds("a", 1)


def snapshot_of_another_block(s):
    s.wrote(1, 0, 2 * CELLS)
    s.took("a")
    s.checker.saw("a", 1, content(0, CELLS, 1))


def snapshot_that_changed(s):
    s.write(1)
    s.took("a")
    s.holds("a", 0)
    s.holds("a", 1)


def snapshot_before_a_block_was_known(s):
    s.took("a")
    s.wrote(1)
    s.holds("a", 1)


def snapshot_that_was_deleted(s):
    s.wrote(1)
    s.took("a")
    s.checker.forget_snapshot("a")
    s.holds("a", 1)


def volume_that_did_not_go_back(s):
    s.wrote(1)
    s.took("a")
    s.wrote(2)
    s.took("k", "a")
    s.reads(2)


def volume_that_went_back_too_far(s):
    s.took("a")
    s.wrote(1)
    s.took("b")
    s.took("k", "b")
    s.reads(0)


def volume_that_went_back_for_nothing(s):
    s.wrote(1)
    s.took("a")
    s.wrote(2)
    s.checker.deny_snapshot(s.ask("k", "a"))
    s.reads(1)


def read_that_saw_what_was_denied(s):
    s.wrote(1)
    s.took("a")
    s.wrote(2)
    asked = s.ask("k", "a")
    s.reads(1)
    s.checker.deny_snapshot(asked)


def kept_is_not_what_was_there(s):
    s.wrote(1)
    s.took("a")
    s.wrote(2)
    s.took("k", "a")
    s.wrote(3)
    s.holds("k", 1)


def snapshot_with_an_effect_without_its_cause(s):
    """Each block for itself may be as it is."""
    s.wrote(1)
    asked = s.ask("a")
    s.wrote(2)
    s.wrote(3, CELLS)
    s.taken(asked)
    s.is_of_one_instant("a", {0: 1, CELLS: 3})


WRONG = (
    snapshot_with_an_effect_without_its_cause,
    snapshot_without_what_was_acknowledged, snapshot_with_what_was_issued_later,
    snapshot_that_turned_out_to_be_there, torn_snapshot, older_part_in_a_snapshot,
    write_seen_in_a_snapshot_only, write_read_before_a_snapshot_without_it,
    snapshots_in_the_wrong_order, snapshot_of_another_block, snapshot_that_changed,
    snapshot_before_a_block_was_known, snapshot_that_was_deleted, volume_that_did_not_go_back,
    volume_that_went_back_too_far, volume_that_went_back_for_nothing,
    read_that_saw_what_was_denied, kept_is_not_what_was_there,
    lost_write, lost_second_write, lost_part_of_a_block, torn_write, torn_between_two,
    back_in_time, unanswered_write_twice, late_copy_of_a_retried_write, fenced_write,
    trimmed_data_back, two_readers_disagree, read_after_its_end, write_never_begun, another_place,
    flipped_bit, half_a_cell)


def test_checker_refuses_wrong_histories(context):
    for history in WRONG:
        try:
            history(Script())
        except Violation:
            continue
        raise AssertionError(f"the checker believes: {history.__name__}")
    return f"{len(WRONG)} histories"


def test_checker_accepts_what_is_legal(context):
    s = Script()
    s.write(1)
    s.reads(0)
    s.reads(1)  # late, but once
    s.reads(1)
    old = s.write(2, 3, 2)
    s.reads(1)
    s.done(s.write(2, 3, 2), [old])
    s.reads(1, 1, 1, 2, 2, 1, 1, 1)
    first, second = s.write(3), s.write(4, 0, 4)
    reader = s.read()
    s.done(second)
    s.done(first)
    s.saw(reader, 4, 4, 4, 4, 3, 3, 3, 3)  # three, then four, though four was answered first
    s.reads(4, 4, 4, 4, 3, 3, 3, 3)
    lost = s.read()
    s.wrote(5)
    s.checker.abandon_read(lost)
    s.reads(5)
    s.wrote(0, 0, 3 * CELLS)
    s.reads(0, count=3 * CELLS)
    assert s.checker.judged > 10


def test_checker_accepts_what_snapshots_may_hold(context):
    s = Script()
    s.wrote(1)
    s.took("a")
    under_way = s.write(2)
    asked = s.ask("b")
    s.wrote(3, 0, 4)
    s.done(under_way)
    s.taken(asked)
    s.holds("b", 3, 3, 3, 3, 2, 2, 2, 2)  # both were under way
    doubtful = s.ask("k", "a")
    s.reads(3, 3, 3, 3, 2, 2, 2, 2)
    s.reads(1)  # nobody was told, but it has happened
    s.wrote(4, 8, 8)  # a block that nobody knew before
    s.taken(doubtful)
    s.holds("a", 1)
    s.holds("k", 3, 3, 3, 3, 2, 2, 2, 2)
    s.holds("b", 0, block=1)
    s.took("l", "b")
    s.reads(0, first=8)
    s.holds("l", 4, block=1)
    s.checker.forget_snapshot("a")
    s.checker.deny_snapshot(s.ask("c"))
    s.reads(3, 3, 3, 3, 2, 2, 2, 2)
    asked = s.ask("m")
    s.wrote(5)
    later = s.write(6, CELLS)
    s.wrote(7, 2 * CELLS)
    s.done(later)
    s.taken(asked)
    s.is_of_one_instant("m", {0: 5, CELLS: 6, 2 * CELLS: 0})
    assert list(s.checker.snapshots) == ["b", "k", "l", "m"]
    assert not s.checker.pending


def test_comparison_of_snapshots_can_fail(context):
    """Copies that differ, are too long, or hold what was never written there."""
    s = Script()
    s.wrote(1)
    s.took("a")
    s.wrote(2)
    good = content(0, CELLS, 1) + bytes(MIB - BLOCK)

    def compare(*images):
        compare_snapshot_images(s.checker, "a", MIB, [io.BytesIO(image) for image in images])
    compare(good, good, good)
    live = content(0, CELLS, 2) + bytes(MIB - BLOCK)
    stray = good[:-CELL] + cell_content(MIB // CELL - 1, 1)
    for images in ((good, good, live), (live, live, live), (good, good, good + bytes(1)),
                   (stray, stray, stray), (bytes(MIB),) * 3):
        try:
            compare(*images)
        except AssertionError:
            continue
        raise RuntimeError("wrong copies are believed")


def test_checker_agrees_with_brute_force(context):
    """Thousands of small random histories, judged a second time by trying every order.

    A snapshot is a read of everything at one instant, of which one learns the answer late.
    """
    source = random.Random(context.seed)
    verdicts = {True: 0, False: 0}
    for _ in range(3000):
        events = random_history(source)
        expected = some_order_explains(events)
        assert judge(events) == expected, f"seed {context.seed}: {events}"
        verdicts[expected] += 1
    assert min(verdicts.values()) > 300, verdicts
    return f"{verdicts[True]} legal, {verdicts[False]} not"


def random_history(source):
    """Begins and ends of up to six requests on two cells of one block; [event, request] pairs."""
    events, open_requests = [], []
    for number in range(1, source.randrange(3, 7)):
        low = source.randrange(2)
        request = {
            "id": number, "read": source.random() < 0.5, "low": low,
            "high": source.randrange(low + 1, 3)}
        if request["read"] and source.random() < 0.5:
            request.update(snapshot=True, low=0, high=2)
        events.append(("begin", request))
        open_requests.append(request)
        while open_requests and source.random() < 0.6:
            ended = open_requests.pop(source.randrange(len(open_requests)))
            if source.random() < 0.85:
                events.append(("end", ended))
    writes = [r["id"] for e, r in events if e == "begin" and not r["read"]]
    for event, request in events:
        if event == "end" and request["read"]:
            request["saw"] = [
                source.choice([0] + writes) for _ in range(request["low"], request["high"])]
    return events


def judge(events):
    script, requests = Script(), {}
    try:
        for event, request in events:
            span = request["low"], request["high"] - request["low"]
            if "snapshot" in request:
                if event == "begin":
                    requests[request["id"]] = script.ask(request["id"])
                else:
                    script.taken(requests[request["id"]])
            elif event == "begin":
                make = script.read if request["read"] else (
                    lambda *s, w=request["id"]: script.write(w, *s))
                requests[request["id"]] = make(*span)
            elif request["read"]:
                script.saw(requests[request["id"]], *request["saw"])
            else:
                script.done(requests[request["id"]])
        ended = {r["id"] for e, r in events if e == "end"}
        for event, request in events:
            if request["read"] and request["id"] not in ended:
                if "snapshot" not in request:
                    script.checker.abandon_read(requests[request["id"]])
                elif event == "begin":
                    script.checker.deny_snapshot(requests[request["id"]])
        for event, request in events:
            if event == "end" and "snapshot" in request:
                script.holds(request["id"], *request["saw"], *(0,) * (CELLS - 2))
    except Violation:
        return False
    return True


def some_order_explains(events):
    begun = {r["id"]: i for i, (e, r) in enumerate(events) if e == "begin"}
    ended = {r["id"]: i for i, (e, r) in enumerate(events) if e == "end"}
    requests = {r["id"]: r for _, r in events}
    must = [i for i in requests if i in ended]
    may = [i for i in requests if i not in ended and not requests[i]["read"]]
    for count in range(len(may) + 1):
        for extra in itertools.combinations(may, count):
            for order in itertools.permutations(must + list(extra)):
                if explains(order, requests, begun, ended):
                    return True
    return False


def explains(order, requests, begun, ended):
    place = {number: i for i, number in enumerate(order)}
    for a in order:
        for b in order:
            if a in ended and ended[a] < begun[b] and place[a] > place[b]:
                return False
    cells = [0, 0]
    for number in order:
        request = requests[number]
        low, high = request["low"], request["high"]
        if not request["read"]:
            cells[low:high] = [number] * (high - low)
        elif cells[low:high] != request["saw"]:
            return False
    return True
