"""A disk, served over NBD, that loses what was not flushed when its power is cut.

Every sector then holds what was last flushed, or any of what was written to it since: writes land
in any order, and larger ones are torn.
"""

import os
import socket
import struct
import tempfile
import threading

from .store import exactly

SECTOR = 512
_READ, _WRITE, _DISCONNECT, _FLUSH = 0, 1, 2, 3
_HAS_FLAGS, _SEND_FLUSH = 1, 4
_EINVAL = 22


class LossyDisk:
    """Kept in two files without names. One connection at a time. Safe to use from any thread."""

    def __init__(self, size, directory):
        self.size = size
        self._now, self._flushed = (
            tempfile.TemporaryFile(dir=directory, buffering=0) for _ in range(2))
        for file in (self._now, self._flushed):
            file.truncate(size)
        self._pending = {}  # sector -> what was written to it since the last flush, oldest first
        self._lock = threading.Lock()
        self.lost = 0  # sectors that a cut has taken a write from
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def uri(self):
        return f"nbd://127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self):
        self._listener.close()
        self._now.close()
        self._flushed.close()

    def lose(self, chance, kept):
        """The power is cut. `chance`: a `random.Random`; `kept`: how much of what was not flushed
        has arrived, 0 to 1."""
        grain = chance.choice((1, 8))  # in pieces of one sector, or a page
        with self._lock:
            dice, last = 0.0, None
            for sector in sorted(self._pending):
                if sector // grain != last:
                    dice, last = chance.random(), sector // grain
                    which = chance.random()
                versions = self._pending[sector]
                if dice < kept:
                    self._write(self._flushed, sector, versions[int(which * len(versions))])
                    self.lost += len(versions) > 1
                else:
                    self.lost += 1
                self._write(self._now, sector, self._read(self._flushed, sector, 1))
            self._pending.clear()

    @staticmethod
    def _read(file, sector, count):
        return os.pread(file.fileno(), count * SECTOR, sector * SECTOR)

    @staticmethod
    def _write(file, sector, data):
        os.pwrite(file.fileno(), data, sector * SECTOR)

    def _flush(self):
        run = []
        for sector in sorted(self._pending):
            if run and sector != run[-1] + 1:
                self._keep(run)
                run = []
            run.append(sector)
        if run:
            self._keep(run)
        self._pending.clear()

    def _keep(self, run):
        self._write(self._flushed, run[0], self._read(self._now, run[0], len(run)))

    # The protocol

    def _accept(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                try:
                    if self._negotiate(connection):
                        self._serve(connection)
                except (ConnectionError, OSError, ValueError):
                    pass  # its machine has no power any more, or the test is over

    def _negotiate(self, connection):
        connection.sendall(struct.pack(">8s8sH", b"NBDMAGIC", b"IHAVEOPT", 3))
        exactly(connection, 4)
        while True:
            _, option, length = struct.unpack(">8sII", exactly(connection, 16))
            exactly(connection, length)

            def reply(kind, data=b"", option=option):
                connection.sendall(
                    struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data)
            if option == 2:  # ABORT
                reply(1)
                return False
            if option in (6, 7):  # INFO, GO
                reply(3, struct.pack(">HQH", 0, self.size, _HAS_FLAGS | _SEND_FLUSH))
                reply(1)
                if option == 7:
                    return True
            else:
                reply(0x80000001)  # not known

    def _serve(self, connection):
        while True:
            _, _, kind, handle, offset, length = struct.unpack(
                ">IHH8sQI", exactly(connection, 28))
            if kind == _DISCONNECT:
                return
            data = exactly(connection, length) if kind == _WRITE else b""
            error, answer = 0, b""
            with self._lock:
                if offset % SECTOR or length % SECTOR or offset + length > self.size:
                    error = _EINVAL
                elif kind == _READ:
                    answer = os.pread(self._now.fileno(), length, offset)
                elif kind == _WRITE:
                    os.pwrite(self._now.fileno(), data, offset)
                    for at in range(0, length, SECTOR):
                        self._pending.setdefault((offset + at) // SECTOR, []).append(
                            data[at:at + SECTOR])
                elif kind == _FLUSH:
                    self._flush()
                else:
                    error = _EINVAL
            connection.sendall(struct.pack(">II8s", 0x67446698, error, handle) + answer)
