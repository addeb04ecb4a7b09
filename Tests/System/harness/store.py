"""A record service in memory: what a controller offers to engines, without a controller.

It also judges: every change must raise the epoch by exactly one, and one value per epoch ever
exists. What breaks that is kept in `violations`.
"""

import socket
import socketserver
import threading

from .frames import (
    COMPARE_AND_SWAP, CONFLICT, GET_RECORD, HEADER_SIZE, INVALID, NOT_FOUND, OK, Header, Record,
    reply)


class RecordStore:
    def __init__(self, host="127.0.0.1"):
        self.host = host
        self.records = {}
        self.history = []  # every record that ever stood
        self.violations = []
        self.objection = lambda proposed: None  # why a change is refused
        self.refused = 0
        self.lock = threading.Lock()
        self.port = None
        self._server = None
        self._connections = set()

    def put(self, record):
        with self.lock:
            self.records[record.volume] = record.encode()
            self.history.append(record)

    def record(self, volume):
        with self.lock:
            return Record.decode(self.records[volume])

    def start(self):
        store = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                store._serve(self.request)

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True

        self._server = Server((self.host, self.port or 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def is_running(self):
        return self._server is not None

    def stop(self):
        """Stops listening and hangs up on everybody, as a killed controller would."""
        self._server.shutdown()
        self._server.server_close()
        self._server = None
        for connection in list(self._connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def _serve(self, connection):
        self._connections.add(connection)
        try:
            while True:
                header = Header.decode(exactly(connection, HEADER_SIZE))
                table = exactly(connection, header.table_length)
                connection.sendall(self._answer(header, table))
        except (ConnectionError, OSError):
            pass
        except ValueError as error:
            self.violations.append(f"bad frame: {error}")
        finally:
            self._connections.discard(connection)

    def _answer(self, header, table):
        with self.lock:
            current = self.records.get(table[:16])
            if header.kind not in (GET_RECORD, COMPARE_AND_SWAP):
                return reply(header, INVALID)
            if current is None:
                return reply(header, NOT_FOUND)
            if header.kind == GET_RECORD:
                return reply(header, OK, current)
            expected = int.from_bytes(table[16:24], "little")
            if Record.decode(current).epoch != expected:
                return reply(header, CONFLICT, current)
            proposed = Record.decode(table[24:])
            if reason := self.objection(proposed):
                self.refused += 1
                return reply(header, INVALID, reason.encode())
            if proposed.epoch != expected + 1:
                self.violations.append(f"epoch {expected} -> {proposed.epoch}")
            if not proposed.in_sync:
                self.violations.append(f"epoch {proposed.epoch}: empty in-sync set")
            self.records[table[:16]] = table[24:]
            self.history.append(proposed)
            return reply(header, OK)


def exactly(connection, count):
    parts = []
    while count > 0:
        part = connection.recv(count)
        if not part:
            raise ConnectionError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
