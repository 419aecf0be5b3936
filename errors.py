"""What scripts and readers share when something goes wrong: one line, an exit code, no half-written file."""
import os
import sys
from contextlib import contextmanager, suppress
from pathlib import Path


class InputError(Exception):
    """Something the user gave is wrong; the message is one line with the file or flag and the way out."""


def one_line(error):
    """An exception in one line of 200 characters at most."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def check_ranges(args, **limits):
    """InputError where a flag of args lies outside its (low, high)."""
    for name, (low, high) in limits.items():
        if not low <= getattr(args, name) <= high:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: has to lie between {low:g} and {high:g}")


@contextmanager
def renamed(path):
    """A temporary name beside path to write to; it takes path's name when the block ends without an error."""
    path = Path(path)
    temp = path.with_name(f".{path.name}.{os.getpid()}.part")  # two runs may prepare the same slide
    try:
        temp.parent.mkdir(parents=True, exist_ok=True)
        yield temp
        os.replace(temp, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); make room or run where you may write") from None
    finally:
        with suppress(OSError):
            temp.unlink()


def exit_code(script, run, memory="--batch", again="run it again to go on"):
    """What run() gives; an error becomes one line on stderr and a code: 2 bad input, 1 a failed run, 130 stopped.

    memory: the flag to lower where memory runs out; again: what to do after a stop.
    """
    try:
        return run()
    except InputError as error:
        says, code = error, 2
    except OSError as error:
        says, code = f"{error.filename}: {error.strerror}", 2
    except FloatingPointError as error:
        says, code = error, 1
    except (MemoryError, RuntimeError) as error:
        if type(error).__name__ not in ("MemoryError", "OutOfMemoryError"):  # the latter is torch's
            raise
        says, code = f"out of memory; lower {memory}", 1
    except KeyboardInterrupt:
        says, code = f"stopped; {again}", 130
    print(f"{script}: {says}", file=sys.stderr)
    return code
