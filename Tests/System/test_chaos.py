"""Faults on a volume in use, with every answer judged: short rounds with fixed seeds.

`Tests/System/chaos/run` draws rounds of its own for as long as told.
"""

from chaos import faults, scenarios
from chaos.volume import Volume


def rounds(context, seed, *mixes):
    """A round for each mix of faults; what they cost."""
    spent = []
    with Volume(context, 1 + seed % 4, seed) as volume:
        for number, mix in enumerate(mixes):
            if number > 0:
                volume.next_round(seed + number)
            volume.progress(20)
            faults.strike_many(volume, mix, seed + number)
            volume.heal()
            spent.append(volume.converge())
            volume.finish_round()
        return (f"{len(mixes)} rounds, {volume.requests} requests judged, in sync after at most "
                f"{max(spent):.1f} s")


def test_chaos_without_faults(context):
    """The harness itself: clients, judge, comparison of the copies, and a second round."""
    return rounds(context, 4, [], [])


def test_chaos_processes(context):
    return rounds(
        context, 11,
        [faults.kill_replica, faults.kill_engine],
        [faults.pause_replica, faults.pause_engine, faults.crash_client],
        [faults.kill_everything, faults.kill_replicas])


def test_chaos_network(context):
    return rounds(
        context, 21,
        [faults.reset_connections, faults.reset_connections, faults.partition],
        [faults.flapping, faults.isolate, faults.clog])


def test_clients_that_give_up(context):
    """Behind a partition of either direction they lose patience, and repeat all on a new connection.

    They reset the old one: what its kernel has not delivered yet must not arrive later.
    """
    with Volume(context, 2, 35) as volume:
        for worker in volume.workers:
            worker.patience = 0.7
        for link in (("client", "engine"), ("engine", "client")):
            volume.progress(30)
            volume.network.cut(*link)
            volume.pass_time(2)
            volume.network.join(*link)
            volume.pass_time(1)
        volume.heal()
        volume.converge()
        volume.finish_round()
        reconnects = sum(w.reconnects for w in volume.workers)
        assert reconnects > 2, "nobody gave up"
        return f"{reconnects} connections, {sum(w.retries for w in volume.workers)} repeats"


def test_chaos_store(context):
    return rounds(context, 31, [faults.store_outage, faults.kill_replica, faults.kill_engine])


def test_chaos_sick_disks(context):
    return rounds(
        context, 42, [faults.slow_disk, faults.failing_disk, faults.failing_disk],
        [faults.full_disk, faults.kill_engine])


def test_chaos_harmed_files(context):
    return rounds(
        context, 61, [faults.flip_bits], [faults.misdirected_blocks],
        [faults.old_copy, faults.lost_directory], [faults.truncated_files])


# The second fault, in the middle of what the first one began: all of them, two a run.

def during(context, seed, scenario):
    """The second faults of a scenario in turn; each I/O back end takes its half."""
    half = scenario.seconds[context.backend == "aio"::2]
    spent = []
    with Volume(context, 2, seed) as volume:
        for number, second in enumerate(half):
            if number > 0:
                volume.next_round(seed + number)
            volume.progress(20)
            scenario.play(volume, second, seed + number)
            volume.heal()
            spent.append(volume.converge())
            volume.finish_round()
        return f"{len(half)} rounds, in sync after at most {max(spent):.1f} s"


def test_second_fault_during_rebuild(context):
    return during(context, 81, scenarios.REBUILD)


def test_second_fault_during_rejoin(context):
    return during(context, 91, scenarios.REJOIN)


def test_second_fault_during_takeover(context):
    return during(context, 101, scenarios.TAKEOVER)


def test_second_fault_during_store_outage(context):
    return during(context, 111, scenarios.STORE_OUTAGE)
