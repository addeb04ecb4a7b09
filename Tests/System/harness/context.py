from .cluster import Cluster


class SkipTest(Exception):
    """The machine lacks what the test needs; the message says what."""


def once(function):
    """Marks a test that takes long and of which one back end tells as much as two."""
    function.is_once = True
    return function


class Context:
    """What the runner hands to a test."""

    def __init__(self, backend, rounds, seed):
        self.backend, self.rounds, self.seed = backend, rounds, seed

    def cluster(self, **arguments):
        return Cluster(environment={"HAPTERA_IO": self.backend}, **arguments)
