"""Other people's clients against the export: nbdinfo, nbdcopy, qemu-img, qemu-io, libnbd, fio."""

import json
import os
import random
import subprocess

CASES = []
MIB = 1 << 20
LENGTH = 48 * MIB


def case(body):
    CASES.append(body)
    return body


def run(*command, timeout=120, directory=None):
    done = subprocess.run(
        command, capture_output=True, timeout=timeout, text=True, cwd=directory)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)}: {done.stdout}{done.stderr}".strip())
    return done.stdout


def sparse_image(path, seed):
    """Data, holes and zeroes in a file of the export's first LENGTH bytes."""
    rng = random.Random(seed)
    with open(path, "wb") as file:
        file.truncate(LENGTH)
        for start in range(0, LENGTH, 4 * MIB):
            file.seek(start + rng.randrange(8) * 65536)
            file.write(rng.randbytes(rng.randrange(1, 40) * 65536))


def head(uri, path):
    """The export's first LENGTH bytes as a file."""
    run("nbdcopy", uri, path)
    os.truncate(path, LENGTH)


def same(a, b):
    run("cmp", a, b)


@case
def nbdinfo(ctx, target):
    info = json.loads(run("nbdinfo", "--json", target.uri))["exports"][0]
    assert info["export-size"] == ctx.size, info
    assert info["block_size_minimum"] == 512 and info["block_size_preferred"] == 4096
    assert info["block_size_maximum"] == 32 * MIB
    assert info["contexts"] == ["base:allocation"]
    for key in ("can_cache", "can_df", "can_fast_zero", "can_flush", "can_fua", "can_multi_conn",
                "can_trim", "can_zero"):
        assert info[key], key
    listed = json.loads(run("nbdinfo", "--json", "--list", target.uri))["exports"]
    assert [export["export-name"] for export in listed] == [target.name], listed
    assert run("nbdinfo", "--size", target.uri).strip() == str(ctx.size)


@case
def nbdcopy_both_ways(ctx, target):
    source, back = ctx.path("source.img"), ctx.path("back.img")
    for connections in (1, 4):
        sparse_image(source, connections)
        run("nbdcopy", f"--connections={connections}", "--flush", source, target.uri)
        run("nbdcopy", f"--connections={connections}", target.uri, back)
        os.truncate(back, LENGTH)
        same(source, back)


@case
def nbdinfo_map(ctx, target):
    source = ctx.path("source.img")
    sparse_image(source, 5)
    run("nbdcopy", source, target.uri)
    extents = json.loads(run("nbdinfo", "--map", "--json", target.uri))
    position = 0
    for extent in extents:
        assert extent["offset"] == position, extent
        position += extent["length"]
    assert position == ctx.size


@case
def qemu_img(ctx, target):
    info = json.loads(run("qemu-img", "info", "--output=json", "-f", "raw", target.uri))
    assert info["virtual-size"] == ctx.size
    source, back = ctx.path("source.img"), ctx.path("back.img")
    sparse_image(source, 6)
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, target.uri)
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", target.uri, back)
    os.truncate(back, LENGTH)
    same(source, back)
    os.truncate(back, LENGTH)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, back)
    mapped = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", target.uri))
    assert sum(extent["length"] for extent in mapped) == ctx.size


@case
def qemu_img_compare_remote(ctx, target):
    whole = ctx.path("whole.img")
    run("nbdcopy", target.uri, whole)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", whole, target.uri)
    os.unlink(whole)


@case
def qemu_io(ctx, target):
    commands = [
        "write -P 0x11 0 8M", "write -P 0x22 512 512", "write -P 0x33 3M 1M", "flush",
        "read -P 0x11 0 512", "read -P 0x22 512 512", "read -P 0x11 1024 2M",
        "write -z 1M 1M", "read -P 0 1M 1M", "write -z -u 4M 1M", "read -P 0 4M 1M",
        "write -f -P 0x44 5M 64k", "read -P 0x44 5M 64k", "discard 6M 1M",
        "aio_write -P 0x55 7M 512k", "aio_flush", "read -P 0x55 7M 512k",
        "write -P 0x66 1023 1", "read -P 0x66 1023 1", "read -P 0x22 512 511",
    ]
    arguments = [part for command in commands for part in ("-c", command)]
    out = run("qemu-io", "-f", "raw", *arguments, target.uri)
    assert "failed" not in out and "error" not in out.lower(), out


LIBNBD = """
import nbd, sys
uri, size = sys.argv[1], int(sys.argv[2])
h = nbd.NBD()
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.connect_uri(uri)
assert h.get_size() == size and h.get_structured_replies_negotiated()
assert h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
data = bytes(range(256)) * 4096
h.pwrite(data, 1 << 20, nbd.CMD_FLAG_FUA)
assert h.pread(len(data), 1 << 20) == data
h.trim(1 << 20, 1 << 20)
h.zero(65536, 1 << 20, nbd.CMD_FLAG_NO_HOLE)
h.zero(65536, (1 << 20) + 65536, nbd.CMD_FLAG_FAST_ZERO)
h.pwrite(data[:65536], (1 << 20) + 131072)
h.cache(1 << 20, 0)
seen = []
h.block_status(262144, 1 << 20, lambda context, offset, entries, error: seen.extend(entries))
assert sum(seen[0::2]) >= 262144, seen
pieces = []
def chunk(buffer, offset, status, error):
    pieces.append((offset, status))
h.pread_structured(1 << 20, 1 << 20, chunk)
assert pieces
assert len(h.pread_structured(65536, 1 << 20, lambda *_: 0, nbd.CMD_FLAG_DF)) == 65536
h.set_strict_mode(0)
for call in (lambda: h.pread(512, size), lambda: h.pwrite(bytes(512), size),
             lambda: h.trim(512, size), lambda: h.zero(512, size)):
    try:
        call()
        raise SystemExit("past the end was accepted")
    except nbd.Error as error:
        assert error.errnum in (22, 28), error
cookies = [h.aio_pread(nbd.Buffer(65536), i * 65536) for i in range(64)]
while cookies:
    h.poll(-1)
    cookies = [c for c in cookies if not h.aio_command_completed(c)]
h.flush()
h.shutdown()
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(uri)
names = []
h.opt_list(lambda name, description: names.append(name))
assert len(names) == 1, names
h.set_export_name("nobody")
try:
    h.opt_info()
    raise SystemExit("an unknown export was found")
except nbd.Error:
    pass
h.opt_abort()
"""


@case
def python_libnbd(ctx, target):
    run("/usr/bin/python3", "-c", LIBNBD, target.uri, str(ctx.size))


def fio(ctx, target, jobs, pattern, block):
    """Writes and verifies; each job has its own connection and its own part."""
    run("fio", "--name=verify", "--ioengine=nbd", f"--uri={target.uri}", f"--rw={pattern}",
        f"--bs={block}", "--iodepth=16", f"--size={LENGTH // jobs}", f"--numjobs={jobs}",
        f"--offset_increment={LENGTH // jobs}", "--verify=crc32c", "--verify_fatal=1",
        "--do_verify=1", "--fsync=64", "--group_reporting", "--thread", "--output-format=terse",
        timeout=180, directory=ctx.directory)


@case
def fio_one_connection(ctx, target):
    fio(ctx, target, 1, "randwrite", "4k")
    fio(ctx, target, 1, "write", "1m")


@case
def fio_four_connections(ctx, target):
    fio(ctx, target, 4, "randwrite", "4k")
    fio(ctx, target, 4, "randrw", "128k")
