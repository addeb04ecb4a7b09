"""storagectl chaos run over real processes, and that it can fail."""

from harness.cluster import MIB, wait_for
from harness.context import once
from harness.plane import Plane

SIZE = 64 * MIB


@once
def test_chaos_command(context):
    with Plane(context) as plane:
        plane.run("volume", "create", "vol", "--size", str(SIZE))
        plane.run("volume", "attach", "vol")
        assert "no scratch volume" in plane.run(
            "chaos", "run", "--volume", "vol", "--for", "1s", fails=True)
        plane.run("volume", "detach", "vol")
        plane.run("volume", "delete", "vol")

        plane.run("volume", "create", "vol", "--size", str(SIZE), "--scratch")
        plane.run("volume", "attach", "vol")
        report = plane.run(
            "chaos", "run", "--volume", "vol", "--for", "15s", "--seed", str(context.seed))
        assert report["violations"] == [], report
        # 512 of them fill the volume before anything is broken.
        assert report["acknowledged"] > 600, report
        caused = {count["fault"] for count in report["faults"] if count["caused"]}

        def is_caused(fault):
            """In a short run: there may be nothing to break just then."""
            short = plane.run(
                "chaos", "run", "--volume", "vol", "--for", "1s", "--faults", fault)
            assert short["violations"] == [], short
            return sum(f["caused"] for f in short["faults"]) > 0
        for fault in {"kill", "pause", "partition", "flip", "full"} - caused:
            wait_for(lambda: is_caused(fault), f"{fault} to be caused")  # pylint: disable=W0640
        done = [event["message"] for event in plane.run("events", "--limit", "500")
                if event["kind"] == "FaultInjected"]
        for fault in ("kill", "pause", "partition", "flip", "full"):
            assert any(message.startswith(fault) for message in done), (fault, done)

        # Somebody else's bytes in the volume: the judge must see them, and say so by its status.
        # (It takes as long as the first fault lasts, 5 s at most, and 192 MiB on the disk.)
        before, foreign = faults(plane), plane.image(SIZE)
        run = plane.start("chaos", "run", "--volume", "vol", "--for", "20s", "--faults", "pause")
        try:
            wait_for(lambda: faults(plane) > before, "the first fault")
            plane.write(foreign)
            output, error = run.communicate(timeout=120)
        finally:
            run.kill()
        assert run.returncode == 1, (output, error)
        assert "violations on volume 'vol', seed" in error, error
        assert "no block ever written" in output, output


@once
def test_fault_ends_without_its_causer(context):
    """Who asked for it may be gone: a paused or cut off replica comes back by itself."""
    with Plane(context) as plane:
        plane.run("volume", "create", "vol", "--size", str(SIZE), "--scratch")
        plane.run("volume", "attach", "vol")
        for fault in ("pause", "partition", "full"):
            count = faults(plane)
            run = plane.start("chaos", "run", "--volume", "vol", "--for", "1m", "--faults", fault)
            wait_for(lambda: faults(plane) > count, fault)
            run.kill()
            run.communicate()
            plane.until("all replicas", lambda v: v["robustness"] == "healthy")
        path = plane.image(4 * MIB)
        plane.write(path)
        assert plane.read()[:4 * MIB] == path.read_bytes()


def faults(plane):
    return sum(e["kind"] == "FaultInjected" for e in plane.run("events", "--limit", "500"))
