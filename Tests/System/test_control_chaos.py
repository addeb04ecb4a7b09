"""The control plane itself under faults, with every answer to the volume's clients judged."""

import random

from chaos.control import FAULTS, Attached
from chaos.gaps import by_disk
from harness.context import once
from harness.plane import Plane
from harness.workload import SyncProbe
from test_gaps import in_time

# Who needed what is away would wait for as long as it is.
PAUSE_SECONDS_MAX = 0.5


def pause_without(volume, probe, name, how, seconds):
    """What a client waits at most while a part is away, and when it comes back."""
    for worker in volume.workers:
        worker.longest_gap = 0.0
    probe.reset_stall()
    with volume.away(name, how):
        volume.answered_for(seconds)
        if (name, how) == (volume.home, "stopped"):
            volume.wait(lambda: not volume.plane.run("node", "show", name)["ready"],
                        "the agent to be missed")
    volume.answered_for(1)
    gap = by_disk(max(worker.longest_gap for worker in volume.workers), probe)
    gap.limit = max(gap.limit, PAUSE_SECONDS_MAX)
    return gap


@once
def test_gap_control_plane(context):
    """No client waits for the controller or a node agent, not even for one that is missed; nothing
    is restarted, moved or decided for want of it."""
    with Plane(context, "volume") as plane, SyncProbe(plane.directory) as probe, \
            Attached(plane, context.seed) as volume:
        before, measured = plane.volume(), []
        for name, how, seconds in (("controller", "killed", 3), ("controller", "stopped", 4),
                                   (volume.home, "killed", 3), (volume.home, "stopped", 6)):
            gap = in_time(pause_without, volume, probe, name, how, seconds)
            measured.append(f"{name} {how}: {gap}")
        volume.converge()
        after = plane.volume()
        assert after["epoch"] == before["epoch"], plane.run("volume", "why", plane.name)
        assert after["engine"]["pid"] == before["engine"]["pid"], after
        assert [r["pid"] for r in after["replicas"]] == [r["pid"] for r in before["replicas"]]
        assert all(worker.reconnects == 0 for worker in volume.workers), "a client was cut off"
        volume.finish()
        return "; ".join(measured)


@once
def test_chaos_control_plane(context):
    """Controller and node agents killed and stopped, alone and with an engine or a replica that
    needs them: clients wait at most, and every copy holds what they were told."""
    print(f"  seed {context.seed}", flush=True)
    with Plane(context, "volume") as plane, Attached(plane, context.seed) as volume:
        faults, spent = list(FAULTS), []
        random.Random(context.seed).shuffle(faults)
        for fault in faults:
            volume.progress()
            fault(volume)
            spent.append(volume.converge())
        judged = volume.finish()
        return (f"seed {context.seed}: {len(faults)} faults, {judged} requests judged, "
                f"in sync after at most {max(spent):.1f} s")
