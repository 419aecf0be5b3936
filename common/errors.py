"""How scripts fail: with an exit code and one line that names the file or flag and says what to do."""
import argparse
import signal
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress


class InputError(Exception):
    """Something the user gave is wrong; the message is one line with the file or flag and what to do."""


class DiskFull(InputError):
    """A file cannot be written for want of space: this ends the run, not the work on one slide alone."""


class Help(argparse.HelpFormatter):
    """Adds a flag's default to its help as one would type it, if it has one."""

    def _get_help_string(self, action):
        default = action.default
        if isinstance(default, (list, tuple)):
            default = " ".join(map(str, default))
        if default in (None, "", "none", argparse.SUPPRESS) or default is False:
            return action.help
        return f"{action.help} (default: {default})"


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises InputError for a wrong flag instead of exiting."""

    def __init__(self, **options):
        super().__init__(formatter_class=Help, **options)

    def error(self, message):
        raise InputError(f"{message}; see {self.prog} --help")


def printable(text):
    """Returns a text with line breaks and control characters escaped, since file names may hold any."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def one_line(error):
    """Returns an exception as one line of at most 200 characters."""
    return printable(" ".join(f"{type(error).__name__}: {error}".split()))[:200]


def first_of(names):
    """Returns the first three names as text."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


class Terminal:
    """stdout or stderr whose write errors are ignored, so that a run survives a closed terminal or pipe."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with suppress(OSError, ValueError):
            return self.stream.write(text)
        return len(text)

    def flush(self):
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


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


def check_mpp(value, flag):
    """InputError for a um/px outside 0.05 to 20, which no slide has; None passes."""
    if value is not None and not 0.05 <= value <= 20:
        raise InputError(f"{flag} {value:g}: um/px between 0.05 and 20 is expected (0.5 is 20x)")


def print_skipped(failed):
    """Prints the lines on files that could not be used."""
    for line in failed:
        print("skipped:", printable(line))


def exit_code_of(failed):
    """Prints the number of skipped files at the end of a run; returns 1 if any was skipped, else 0."""
    if failed:
        print(f"{len(failed)} files were skipped (see above).")
    return int(bool(failed))


def run_script(script, run, memory="--batch", again="run it again to resume"):
    """Returns the exit code of run(), or 2 for bad input, 1 for a failed run, 130 for Ctrl-C.

    An error becomes one line on stderr. memory: the flag to lower when memory runs out; again: what to do
    after Ctrl-C.
    """
    def report(message, code):
        print(f"{script}: {printable(message)}", file=sys.stderr)
        return code
    with redirect_stdout(Terminal(sys.stdout)), redirect_stderr(Terminal(sys.stderr)):
        try:
            return run()
        except InputError as error:
            return report(error, 2)
        except OSError as error:
            return report(f"{error.filename}: {error.strerror}" if error.filename else error, 2)
        except FloatingPointError as error:
            return report(error, 1)
        except (MemoryError, RuntimeError) as error:
            out_of_memory = type(error).__name__ in ("MemoryError", "OutOfMemoryError")  # the latter: torch's
            if not (out_of_memory or "allocate memory" in str(error)):  # torch's message on a CPU
                raise
            return report(f"out of memory; lower {memory}", 1)
        except KeyboardInterrupt:
            return report(f"stopped; {again}", 130)
