"""Errors that the user can fix, how a script shows them, and its standard streams."""

import contextlib
import errno
import os
import signal
import sys
import tempfile


class UserError(ValueError):
    """An error that the user can fix. Its message is one line and says how."""

    exit_code = 1


class BusyError(UserError):
    """Another process is at work on the same run."""

    exit_code = os.EX_TEMPFAIL  # by which tools/sweep.py knows it


class DeviceError(UserError):
    """JAX's device has failed, for this run and all others."""

    exit_code = os.EX_UNAVAILABLE  # by which tools/sweep.py knows it


@contextlib.contextmanager
def one_line_errors():
    """End the program with one line where a UserError is raised, without a traceback.

    Ctrl-C ends it without a word. A closed output, as after `| head`, doesn't end it. Nor does a
    full disk behind the output, which is an error at the end.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    output = Output(sys.stdout)
    sys.stdout = output
    sys.stderr = Output(sys.stderr)
    try:
        yield
        output.flush()
        if output.lost:
            raise UserError(f"what was printed is lost in part ({output.lost.strerror})")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


@contextlib.contextmanager
def disk_errors(path, advice=""):
    """Make a UserError about `path`, with the `advice`, of an error of the disk, as a full one."""
    try:
        yield
    except OSError as error:
        why = error.strerror or one_line(error)
        line = f"can't write to {path} ({why})"
        raise UserError(f"{line}; {advice}" if advice else line) from error


def make_folder(path):
    """Make a folder, unless it is there. Raise UserError if no file can be written into it."""
    with disk_errors(path):
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()


def one_line(error):
    """Return the text of any error without its line breaks."""
    return " ".join(str(error).split())


# --- Standard streams ---


class Output:
    """A standard stream whose end, or full disk, ends no run.

    It leads to nowhere once its reader is gone, as after `| head`. While its disk is full, what is
    written is lost. Letters that its encoding lacks are written as Python's escapes.
    """

    lost = None  # the error of a full disk

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with self.survives():
            self.stream.write(text)

    def flush(self):
        with self.survives():
            self.stream.flush()

    @contextlib.contextmanager
    def survives(self):
        try:
            yield
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):  # a closed pipe, a closed terminal
                with open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), self.stream.fileno())
            elif error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                self.lost = error
            else:
                raise


def open_closed_streams():
    """Let standard streams that are closed lead to nowhere, before a file gets their number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


open_closed_streams()
