"""What a client waits when something dies. One attempt in three must be in time, or no more beyond
it than this machine stalled meanwhile: it may be busy; `bench/gaps` judges many, and strictly."""

from chaos import gaps


def in_time(measure, *arguments):
    measured = []
    for _ in range(3):
        measured.append(measure(*arguments))
        if measured[-1].is_met_when_busy:
            return ", after ".join(map(str, reversed(measured)))
    raise AssertionError(f"too long in {len(measured)} attempts: {', '.join(map(str, measured))}")


def test_gap_replica_killed(context):
    return in_time(gaps.replica_killed, context)


def test_gap_replica_stopped(context):
    return in_time(gaps.replica_stopped, context)


def test_gap_engine_killed(context):
    return in_time(gaps.engine_killed, context)


def test_gap_engine_restarted(context):
    return in_time(gaps.engine_restarted, context)


def test_gap_store_away(context):
    return in_time(gaps.store_away, context, 5)
