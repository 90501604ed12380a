"""Errors that the user can fix, and how a script shows them."""

import contextlib
import os
import sys


class UserError(ValueError):
    """An error that the user can fix. Its message is one line and says how."""

    exit_code = 1


class BusyError(UserError):
    """Another process is at work on the same run."""

    exit_code = os.EX_TEMPFAIL  # by which tools/sweep.py knows it


@contextlib.contextmanager
def one_line_errors():
    """End the program with one line where a UserError is raised, without a traceback."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def one_line(error):
    """Return the text of any error without its line breaks."""
    return " ".join(str(error).split())
