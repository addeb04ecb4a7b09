"""The judge of the chaos runs, judged: wrong histories it must refuse, and random ones."""

import itertools
import random

from chaos.checker import READ, WRITE, Checker, Violation
from chaos.data import CELL, CELLS, cell_content, content


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


WRONG = (
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


def test_checker_agrees_with_brute_force(context):
    """Thousands of small random histories, judged a second time by trying every order."""
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
            if event == "begin":
                make = script.read if request["read"] else (
                    lambda *s, w=request["id"]: script.write(w, *s))
                requests[request["id"]] = make(*span)
            elif request["read"]:
                script.saw(requests[request["id"]], *request["saw"])
            else:
                script.done(requests[request["id"]])
        ended = {r["id"] for e, r in events if e == "end"}
        for _, request in events:
            if request["read"] and request["id"] not in ended:
                script.checker.abandon_read(requests[request["id"]])
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
