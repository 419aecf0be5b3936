"""Signals that ask a run to stop."""
import signal
from contextlib import contextmanager


@contextmanager
def stop_signals():
    """Yields a list that gets an entry when a signal asks the program to stop; the block decides when to."""
    received = []
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # the last is missing on Windows
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    old = [signal.signal(number, lambda *_: received.append(1)) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, old):
            signal.signal(number, handler)
