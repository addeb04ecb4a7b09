"""The command line and the control socket of the data-plane programs, for their stand-ins."""
import os, socket


def options(words):
    values = {}
    for name, value in zip(words[::2], words[1::2]):
        name = name.removeprefix("--")
        if name == "replica":
            values.setdefault(name, []).append(value)
        else:
            values[name] = value
    return values


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
            reply = "ok\n" + "".join(f"{k}={v}\n" for k, v in answer(words[0], values).items())
            connection.sendall((reply + "\n").encode())
            if words[0] == last:
                return
