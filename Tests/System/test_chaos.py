"""Faults on a volume in use, with every answer judged: short rounds with fixed seeds.

`Tests/System/chaos/run` draws rounds of its own for as long as told.
"""

from chaos import faults, scenarios
from chaos.snapshots import DELETE, REVERT, TAKE
from chaos.volume import Volume
from harness.cluster import MIB


def rounds(context, seed, *mixes):
    """A round for each mix of faults, every other one with snapshots; what they cost."""
    spent = []
    with Volume(context, 1 + seed % 4, seed) as volume:
        for number, mix in enumerate(mixes):
            if number > 0:
                volume.next_round(seed + number)
            volume.progress(20)
            if number % 2 == 1:
                volume.administrator.begin()
            faults.strike_many(volume, mix, seed + number)
            volume.heal()
            volume.administrator.finish()
            spent.append(volume.converge())
            volume.finish_round()
        return (f"{len(mixes)} rounds, {volume.requests} requests judged, in sync after at most "
                f"{max(spent):.1f} s, snapshots: {volume.administrator}")


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


def test_chaos_snapshots(context):
    """Snapshots taken, deleted and gone back to while processes die and links are cut, over a
    volume with several layers: each must hold the volume of one instant, on every copy."""
    with Volume(context, 3, 121, size=32 * MIB) as volume:
        administrator = volume.administrator
        for number, mix in enumerate((
                [faults.kill_engine, faults.kill_replica, faults.store_outage],
                [faults.kill_everything, faults.partition_one_way, faults.pause_engine])):
            if number > 0:
                volume.next_round(121 + number)
            volume.progress(20)
            administrator.begin([TAKE, TAKE, REVERT, TAKE, DELETE, REVERT, TAKE])
            faults.strike_many(volume, mix, 121 + number)
            volume.heal()
            volume.wait(lambda: not administrator.plan, "the administrator's plan")
            administrator.finish()
            volume.converge()
            volume.finish_round()
        assert administrator.counts["compared"] >= 2, administrator
        layers = len(volume.cluster.record().layers)
        assert layers > 2, f"{layers} layers"
        return f"{volume.requests} requests judged, {layers} layers, {administrator}"


def test_chaos_sick_disks(context):
    return rounds(
        context, 42, [faults.slow_disk, faults.failing_disk, faults.failing_disk],
        [faults.throttled_disk, faults.full_disk, faults.kill_engine])


def test_chaos_harmed_files(context):
    return rounds(
        context, 61, [faults.flip_bits], [faults.misdirected_blocks],
        [faults.old_copy, faults.lost_directory], [faults.truncated_files])


def test_chaos_harmed_layers(context):
    """Bits flip in frozen layers, and are repaired; in a log and tables, and the copy is replaced."""
    with Volume(context, 2, 131, size=32 * MIB) as volume:
        volume.progress(50)
        volume.administrator.begin([TAKE, TAKE])
        volume.wait(lambda: not volume.administrator.plan, "some layers")
        # It might delete them, and then nothing is below the head.
        volume.administrator.finish()
        faults.strike(volume, faults.flip_bits, 131)
        harmed = volume.harmed_below
        assert harmed > 0, "nothing was harmed below the head"
        volume.heal()
        volume.converge()
        volume.finish_round()
        volume.next_round(132)
        volume.progress(20)
        # Before the administrator: a snapshot's flush may leave a log without a record to harm.
        faults.strike(volume, faults.harmed_log, 132)
        volume.administrator.begin()
        volume.wait(lambda: volume.made_anew > 0, "the copy with a damaged log to be replaced")
        faults.strike(volume, faults.harmed_tables, 133)
        volume.administrator.finish()
        volume.converge()
        volume.finish_round()
        return (f"{harmed} blocks below the head harmed, {volume.made_anew} copies made anew, "
                f"snapshots: {volume.administrator}")


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
