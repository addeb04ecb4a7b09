"""A second fault in the very middle of what a first one began: the engine's status says when."""

from . import faults


class Scenario:
    """`begin(volume)` starts something; as soon as `is_there(volume)`, a second fault strikes."""

    def __init__(self, name, begin, is_there, seconds):
        self.name, self.begin, self.is_there, self.seconds = name, begin, is_there, seconds

    def play(self, volume, second, seed):
        volume.note(f"{self.name}, then {second.__name__}")
        self.begin(volume)
        volume.wait(lambda: self.is_there(volume), f"the middle of {self.name}")
        faults.strike(volume, second, seed)


def down(volume):
    replica = volume.cluster.replicas[0]
    volume.hold(replica)
    volume.wait(lambda: not volume.is_member(replica), "the removal of what is down")
    return replica


def fill_slowly(volume):
    """A replica comes back empty, on a disk that takes its time."""
    replica = down(volume)
    volume.make_anew(replica)
    replica.environment = {"HAPTERA_FAULTS": "write:data:delay=40"}
    volume.release(replica)


def come_back_slowly(volume):
    """A replica comes back with what it had, on a disk that takes its time."""
    replica = down(volume)
    volume.progress(30)
    replica.environment = {"HAPTERA_FAULTS": "write:data:delay=40;sync:any:delay=100"}
    volume.release(replica)


def take_over(volume):
    """The engine dies with writes on the way to replicas of different speed."""
    for replica in volume.cluster.replicas[:2]:
        faults.restart_with(volume, replica, f"any:data:delay={10 * replica.number}")
        volume.pass_time(0.1)
    volume.converge()
    volume.kill("engine")


def without_store(volume):
    """A member lost while the store is away: nothing can be decided."""
    volume.cluster.stop_store()
    volume.hold(volume.cluster.replicas[0])


def is_joining(volume):
    return "joining" in (v for k, v in volume.status().items() if k.startswith("replica."))


def is_taking_over(volume):
    """A new engine that has begun: it claims the volume, or makes the copies equal."""
    status = volume.status()
    return (status.get("state") in ("starting", "stalled")
            or status.get("unresolvedRegions", "0") != "0")


def has_no_store(volume):
    return volume.status().get("storeAvailable") == "false"


ANY = [faults.kill_engine, faults.kill_replica, faults.store_outage, faults.kill_replicas,
       faults.partition_one_way, faults.partition_both_ways]
REBUILD = Scenario("a rebuild", fill_slowly, is_joining, ANY)
REJOIN = Scenario("a rejoin", come_back_slowly, is_joining, ANY)
TAKEOVER = Scenario("a takeover", take_over, is_taking_over, ANY)
STORE_OUTAGE = Scenario(
    "a loss without the store", without_store, has_no_store,
    [faults.kill_engine, faults.isolate, faults.kill_replicas, faults.partition])
ALL = [REBUILD, REJOIN, TAKEOVER, STORE_OUTAGE]
