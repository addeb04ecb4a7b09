"""Volumes that are not attached: their snapshots are read, and they are scrubbed. Whoever attaches is
attached at once, and what went on goes on with his engine."""

import json
import signal
import subprocess
import time

from harness.cluster import MIB, wait_for
from harness.context import once
from harness.plane import Plane
from test_detached import attach, detach, engines, kinds, until_idle, words

SIZE = 64 * MIB


def written(plane, size=SIZE, replicas=()):
    """A volume with the snapshots `a` and `b`, detached; what they hold."""
    plane.run("volume", "create", "vol", "--size", str(size), *replicas)
    image = bytearray(plane.image(size).read_bytes())
    attach(plane)
    plane.write(plane.directory / "image")
    plane.run("snapshot", "create", "vol", "a")
    contents = {"a": bytes(image)}
    change = plane.image(3 * MIB)
    plane.write(change, 5 * MIB)
    image[5 * MIB:8 * MIB] = change.read_bytes()
    plane.run("snapshot", "create", "vol", "b")
    contents["b"] = bytes(image)
    return contents


def export(plane, name, file, *options):
    path = plane.directory / file
    path.unlink(missing_ok=True)
    plane.run("snapshot", "export", "vol", name, str(path), *options)
    return path


def serve(plane, name, *options):
    """A `snapshot serve` that runs, and where it serves."""
    process = plane.start("snapshot", "serve", "vol", name, *options)
    text = ""
    while not text.endswith("\n}\n"):
        line = process.stdout.readline()
        assert line, process.communicate()
        text += line
    return process, json.loads(text)


def nbdinfo(*words_):
    return subprocess.run(["nbdinfo", *words_], capture_output=True, text=True, check=False)


@once
def test_detached_snapshots_are_read(context):
    """Copies and what has changed are the same as of the attached volume. Nobody gets at the volume
    itself, what is read is not deleted, and the engine is gone when nobody reads any more."""
    with Plane(context) as plane:
        contents = written(plane)
        attached = {name: export(plane, name, name).read_bytes() for name in contents}
        assert attached == contents
        changed = plane.run("snapshot", "diff", "vol", "a", "b")
        detach(plane)
        assert "name a later snapshot" in plane.run("snapshot", "diff", "vol", "a", fails=True)
        assert "snapshot serve" in plane.run("snapshot", "mount-info", "vol", "a", fails=True)
        assert not engines(plane)
        assert export(plane, "a", "a").read_bytes() == contents["a"]
        image = export(plane, "b", "b.qcow2", "--format", "qcow2")
        raw = plane.directory / "raw"
        subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True)
        assert raw.read_bytes() == contents["b"]
        assert plane.run("snapshot", "diff", "vol", "a", "b") == changed
        piped = plane.start_bytes("snapshot", "export", "vol", "b", "-")
        assert piped.communicate(timeout=120)[0] == contents["b"] and piped.returncode == 0
        until_idle(plane)
        unknown = plane.run(
            "snapshot", "export", "vol", "c", str(plane.directory / "none"), fails=True)
        assert "no snapshot" in unknown, unknown

        serving, place = serve(plane, "a")
        (engine,) = engines(plane)
        assert "--maintenance" in words(engine)
        assert nbdinfo("--size", place["localURI"]).stdout.strip() == str(SIZE)
        listed = json.loads(nbdinfo("--list", "--json", place["unixURI"]).stdout)
        names = [one["export-name"] for one in listed["exports"]]
        assert names == ["vol@a", "vol@b"], names
        for uri in (place["uri"], place["unixURI"], place["localURI"]):
            assert nbdinfo("--size", uri).returncode == 0, uri
            live = nbdinfo("--size", uri.replace("vol@a", "vol"))
            assert live.returncode != 0, live
        said = subprocess.run(
            ["qemu-img", "info", "-f", "raw", place["uri"].replace("@a", "")],
            capture_output=True, text=True, check=False).stderr
        assert "volume 'vol' is not attached: only its snapshots can be read" in said, said
        volume = plane.volume()
        assert volume["state"] == "detached" and volume["engine"] is None
        assert volume["reason"] == "a snapshot is being read", volume
        assert plane.run("snapshot", "mount-info", "vol", "b")["uri"].endswith("/vol@b")
        assert "being read" in plane.run("snapshot", "delete", "vol", "a", "--yes", fails=True)
        assert "being read" in plane.run("volume", "delete", "vol", fails=True)
        plane.run("snapshot", "revert", "vol", "a", "--keep", "kept", "--yes")
        serving.send_signal(signal.SIGINT)
        assert serving.wait(30) == 0
        until_idle(plane)
        # What a killed command leaves is ended when its lease has run out.
        serving, place = serve(plane, "b")
        serving.kill()
        begun = time.monotonic()
        serving.communicate()
        wait_for(lambda: not engines(plane), "the engine to be gone", 40)
        ended = time.monotonic() - begun
        assert ended < 20, ended
        serving, place = serve(plane, "b", "--for", "2s")
        assert serving.wait(30) == 0
        until_idle(plane)
        assert attach(plane) == contents["a"]
        assert "MaintenanceAbandoned" not in kinds(plane)
        return f"{changed['changedBytes']} bytes changed; a killed reader's engine left in {ended:.0f} s"


@once
def test_attach_during_export(context):
    """A copy that is under way while the volume is attached elsewhere, written, detached and attached
    where it was, while the controller is killed and while an engine is, holds what it should. An
    attachment does not wait for it."""
    with Plane(context) as plane:
        contents = written(plane)
        detach(plane)
        begun = time.monotonic()
        plane.run("volume", "attach", "vol", "--node", "node-1")
        alone = time.monotonic() - begun
        detach(plane)
        copying = plane.start_bytes("snapshot", "export", "vol", "b", "-")
        copy = bytearray()

        def read(count):
            while count > 0:
                part = copying.stdout.read(min(count, MIB))
                assert part, (len(copy), copying.communicate())
                copy.extend(part)
                count -= len(part)

        read(MIB)
        waits = []
        for node in ("node-3", "node-1", "node-2"):
            begun = time.monotonic()
            plane.run("volume", "attach", "vol", "--node", node)
            waits.append(time.monotonic() - begun)
            plane.write(plane.image(2 * MIB), 4 * MIB)
            read(6 * MIB)
            detach(plane)
            read(6 * MIB)
        plane.kill(plane.daemon("controller"))
        read(4 * MIB)
        plane.up()
        until = wait_for(lambda: engines(plane), "its engine")
        plane.kill(until[0])
        read(SIZE - len(copy))
        assert copying.stdout.read() == b"" and copying.wait(60) == 0, copying.stderr.read()
        assert copy == contents["b"], "the copy is not the snapshot"
        assert max(waits) < max(8, 5 * alone), (waits, alone)
        until_idle(plane)
        return f"attached after {max(waits):.1f} s at most, {alone:.1f} s without an export"


def layer_files(plane, node):
    replica = plane.cluster / node / "replicas" / plane.replicas()[node]["id"]
    return sorted((replica / "layers").glob("*.data"))


def flip(path, offset):
    with open(path, "r+b", buffering=0) as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 4]))


@once
def test_detached_volume_is_scrubbed(context):
    """Damage in a replica of a detached volume, in its head and below a snapshot, is found and
    repaired; the volume stays detached."""
    with Plane(context) as plane:
        contents = written(plane)
        detach(plane)
        flip(layer_files(plane, "node-1")[0], 40 * MIB + 77)
        flip(layer_files(plane, "node-3")[1], 6 * MIB + 9)
        begun = time.monotonic()
        said = plane.run("volume", "verify", "vol", fails=True)
        assert "2 blocks were repaired" in said, said
        took = time.monotonic() - begun
        found = plane.run("volume", "scrub-status", "vol")
        assert found["state"] == "finished" and found["blocksBad"] == 2, found
        assert found["blocksRepaired"] == 2 and found["blocksLost"] == 0, found
        assert found["regionsDone"] == found["regionsTotal"] == SIZE // MIB, found
        until_idle(plane)
        assert plane.volume()["state"] == "detached"
        assert plane.run("volume", "scrub-status", "vol") == found
        again = plane.run("volume", "verify", "vol")
        assert again["blocksBad"] == 0, again
        seen = kinds(plane)
        assert seen.count("ScrubRequested") == seen.count("ScrubFinished") == 2, seen
        until_idle(plane)
        assert attach(plane) == contents["b"]
        return f"{found['blocksChecked']} blocks in {took:.1f} s"


@once
def test_scrub_goes_on_over_attachments(context):
    """A scrub that an attachment interrupts, and its end, and a killed controller, is at no time
    further back than it was, and finds what is damaged behind that."""
    size = 480 * MIB
    with Plane(context) as plane:
        plane.run("volume", "create", "vol", "--size", str(size))
        content = b""
        plane.run("volume", "attach", "vol")
        for offset in (0, size // 2):
            image = plane.image(size // 2)
            plane.write(image, offset)
            content += image.read_bytes()
        detach(plane)
        flip(layer_files(plane, "node-2")[-1], size - MIB + 5)

        def status():
            return plane.run("volume", "scrub-status", "vol")

        plane.run("volume", "scrub", "vol")
        seen = [wait_for(
            lambda: (now := status())["regionsDone"] > 0 and now, "some regions", 60)]
        assert seen[0]["state"] == "running", seen
        steps = [
            lambda: plane.run("volume", "attach", "vol", "--node", "node-3"),
            lambda: detach(plane),
            lambda: (plane.kill(plane.daemon("controller")), plane.up()),
            lambda: plane.run("volume", "attach", "vol", "--node", "node-1"),
        ]
        wasted = 0
        for step in steps:
            before = status()
            begun = time.monotonic()
            step()
            wasted = max(wasted, time.monotonic() - begun)
            # The next engine tells of it within a second or two; what is noted was less.
            wait_for(lambda: (now := status())["state"] in ("running", "finished")
                     and now["regionsDone"] >= before["regionsDone"], "it to go on", 60)
            seen.append(status())
        wait_for(lambda: status()["state"] == "finished", "its end", 180)
        found = status()
        assert found["blocksBad"] == found["blocksRepaired"] == 1, found
        assert found["regionsDone"] == size // MIB, found
        assert found["blocksChecked"] >= 3 * size // 4096, found
        events = kinds(plane)
        assert events.count("ScrubFinished") == 1
        # Not judged by what was seen after the attachment: the next engine may have ended it by
        # the time it is asked.
        events = events[events.index("ScrubRequested"):]
        assert events.index("VolumeAttached") < events.index("ScrubFinished"), (
            "it was over before it was interrupted")
        assert plane.read() == content
        again = found["blocksChecked"] - 3 * size // 4096
        return (f"interrupted at {[one['regionsDone'] for one in seen]} of {size // MIB}, "
                f"{again} blocks checked twice, longest step {wasted:.1f} s")


@once
def test_detached_scrubs_take_turns(context):
    """Several volumes at once: one after the other, for they share their nodes."""
    with Plane(context) as plane:
        names = [f"v{number}" for number in range(3)]
        for name in names:
            plane.run("volume", "create", name, "--size", str(SIZE))
            plane.run("volume", "attach", name)
            uri = plane.run("volume", "show", name)["engine"]["uri"]
            subprocess.run(
                ["qemu-io", "-f", "raw", "-c", f"write -P 7 0 {SIZE // 2}", uri],
                check=True, capture_output=True)
            plane.run("volume", "detach", name)
        for name in names:
            plane.run("volume", "scrub", name)
        most = 0

        def done():
            nonlocal most
            most = max(most, len(engines(plane)))
            return all(plane.run("volume", "scrub-status", name)["state"] == "finished"
                       for name in names)

        wait_for(done, "all of them", 120)
        # One may be leaving while the next begins.
        assert 1 <= most <= 2, most
        wait_for(lambda: not engines(plane), "the engines to be gone", 30)
        return f"at most {most} engines"
