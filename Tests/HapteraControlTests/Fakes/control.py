"""The command line and the control socket of the data-plane programs, for their stand-ins."""
import os, socket


def options(words):
    values = {}
    words = list(words)
    while words:
        name = words.pop(0).removeprefix("--")
        if not words or words[0].startswith("--"):
            values[name] = True
            continue
        value = words.pop(0)
        if name == "replica":
            values.setdefault(name, []).append(value)
        else:
            values[name] = value
    return values


class Refusal(Exception):
    """Answered as an error; without words, by hanging up."""


def serve(path, answer, last):
    """Answers requests until the verb `last` has been answered."""
    if os.path.exists(path):
        os.remove(path)
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen()
    while True:
        connection, _ = server.accept()
        with connection:
            words = connection.makefile().readline().split()
            if not words:
                continue
            values = dict(word.split("=", 1) for word in words[1:])
            try:
                fields = answer(words[0], values)
            except Refusal as refusal:
                if refusal.args:
                    connection.sendall(f"error {refusal}\n\n".encode())
                continue
            reply = "ok\n" + "".join(f"{k}={v}\n" for k, v in fields.items())
            try:
                connection.sendall((reply + "\n").encode())
            except BrokenPipeError:
                pass  # Whoever asked has given up.
            if words[0] == last:
                return
