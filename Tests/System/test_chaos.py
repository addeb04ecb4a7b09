"""Faults on a volume in use, with every answer judged: short rounds with fixed seeds.

`Tests/System/chaos/run` draws rounds of its own for as long as told.
"""

from chaos import faults
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
        [faults.pause_replica, faults.kill_engine, faults.crash_client],
        [faults.kill_everything, faults.kill_replicas])


def test_chaos_pauses(context):
    return rounds(context, 13, [faults.pause_engine, faults.kill_replica])


def test_chaos_network(context):
    return rounds(
        context, 21,
        [faults.reset_connections, faults.reset_connections, faults.partition],
        [faults.flapping, faults.kill_replica],
        [faults.isolate, faults.clog])


def test_chaos_store(context):
    return rounds(context, 31, [faults.store_outage, faults.kill_replica, faults.kill_engine])


def test_chaos_sick_disks(context):
    return rounds(
        context, 42, [faults.slow_disk, faults.kill_engine],
        [faults.failing_disk, faults.failing_disk])


def test_chaos_full_disk(context):
    return rounds(context, 51, [faults.full_disk, faults.kill_engine])


def test_chaos_harmed_files(context):
    return rounds(
        context, 61, [faults.flip_bits], [faults.misdirected_blocks], [faults.lost_directory],
        [faults.old_copy])


def test_chaos_truncated_files(context):
    return rounds(context, 71, [faults.truncated_files])


# The second fault, in the middle of what the first one began.

def during(context, seed, begin, stage, seconds):
    """`begin(volume)`, then each of `seconds` as soon as `stage(volume)`: a round each."""
    spent, hit = [], 0
    with Volume(context, 2, seed) as volume:
        for number, second in enumerate(seconds):
            if number > 0:
                volume.next_round(seed + number)
            volume.progress(20)
            begin(volume)
            volume.wait(lambda: stage(volume), f"the moment of {second.__name__}")
            hit += stage(volume)
            faults.strike(volume, second, seed + number)
            volume.heal()
            spent.append(volume.converge())
            volume.finish_round()
        return f"{hit} of {len(spent)} in time, in sync after at most {max(spent):.1f} s"


def is_joining(volume):
    return "joining" in (v for k, v in volume.status().items() if k.startswith("replica."))


def fill_slowly(volume):
    """Replica 1 comes back empty, on a disk that takes its time."""
    replica = volume.cluster.replicas[0]
    volume.hold(replica)
    volume.wait(lambda: not volume.is_member(replica), "the removal of what is down")
    volume.make_anew(replica)
    replica.environment = {"HAPTERA_FAULTS": "write:data:delay=40"}
    volume.release(replica)


def come_back_slowly(volume):
    """Replica 1 comes back with what it had, on a disk that takes its time."""
    replica = volume.cluster.replicas[0]
    volume.hold(replica)
    volume.wait(lambda: not volume.is_member(replica), "the removal of what is down")
    volume.progress(30)
    replica.environment = {"HAPTERA_FAULTS": "write:data:delay=40;sync:any:delay=100"}
    volume.release(replica)


def take_over_slowly(volume):
    """The engine dies with much on the way to replicas of different speed."""
    for replica in volume.cluster.replicas[:2]:
        faults.restart_with(volume, replica, f"any:data:delay={10 * replica.number}")
        volume.wait(lambda: not volume.is_member(replica) or volume.state(replica) == "inSync",
                    "the replica to be back")
    volume.converge()
    volume.kill("engine")


def without_store(volume):
    """A member lost while the store is away: nothing can be decided."""
    volume.cluster.stop_store()
    volume.hold(volume.cluster.replicas[0])


SECOND = [faults.kill_engine, faults.kill_replica, faults.store_outage, faults.kill_replicas]


def test_second_fault_during_rebuild(context):
    return during(context, 81, fill_slowly, is_joining, SECOND)


def test_second_fault_during_rejoin(context):
    return during(context, 91, come_back_slowly, is_joining, SECOND)


def test_second_fault_during_takeover(context):
    def is_taking_over(volume):
        status = volume.status()
        return (status.get("state") == "starting"
                or int(status.get("unresolvedRegions", 0)) > 0
                or status.get("resolve.regionsTotal", "0") != "0"
                or status.get("state") == "serving")
    return during(context, 101, take_over_slowly, is_taking_over, SECOND)


def test_second_fault_during_store_outage(context):
    def is_waiting(volume):
        return volume.status().get("storeAvailable") == "false"
    return during(context, 111, without_store, is_waiting,
                  [faults.kill_engine, faults.kill_replicas, faults.isolate])
