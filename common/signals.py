"""What a run does when it is told to stop."""
import signal
from contextlib import contextmanager


@contextmanager
def stop_signals():
    """A list that SIGINT, SIGTERM and SIGHUP (not on Windows) fill, instead of ending the program."""
    received = []
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [getattr(signal, name) for name in names]
    old = [signal.signal(number, lambda *_: received.append(1)) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, old):
            signal.signal(number, handler)
