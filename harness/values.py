"""Values of a config's fields, read strictly from words of the command line or from YAML."""

import ast
import contextlib
import csv
import math
import os
import typing


def read_value(kind, value):
    """Return a value in a field's type: bool, int, float, str, Optional, List or Tuple of pairs.

    A word is read as Python's int and float read it, and never as YAML. Only a config file can
    say null, for None. Raises ValueError for what isn't of the type.
    """
    origin = typing.get_origin(kind)
    if origin is typing.Union:
        inner = typing.get_args(kind)[0]
        return None if value is None else read_value(inner, value)
    if origin is list:
        (inner,) = typing.get_args(kind)
        return [read_value(inner, item) for item in split_list(value)]
    if origin is tuple:
        return read_pairs(value)
    return {bool: read_bool, int: read_int, float: read_float, str: read_text}[kind](value)


def read_bool(value):
    word = str(value).lower()
    if word not in ("true", "false"):
        raise ValueError("neither true nor false")
    return word == "true"


def read_int(value):
    """Read a whole number, also 1e5."""
    refuse_bool(value)
    with contextlib.suppress(ValueError):
        return int(str(value))
    number = float(value)
    if not number.is_integer():
        raise ValueError("not a whole number")
    return int(number)


def read_float(value):
    refuse_bool(value)
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number


def read_text(value):
    """Read a text. The folder ~ is the user's home."""
    if not isinstance(value, str) or value == "":
        raise ValueError("no text")
    return os.path.expanduser(value) if value.startswith("~/") else value


def refuse_bool(value):
    if isinstance(value, bool):
        raise ValueError("a bool is no number")


def split_list(value):
    """Return the items of a list, or of a word: [a, "b, c"] has two, and what has no [] is one."""
    if not isinstance(value, str):
        return list(value)
    if not (value.startswith("[") and value.endswith("]")):
        return [value]
    try:
        (items,) = csv.reader([value[1:-1].replace("'", '"')], skipinitialspace=True)
    except csv.Error as error:
        raise ValueError(str(error)) from error
    return [item.strip() for item in items if item.strip()]


def read_pairs(value):
    """Return the pairs of a list, or of a word such as "[[0.2, 0], [0, 0.05]]"."""
    if isinstance(value, str):
        value = ast.literal_eval(value)
    pairs = []
    for pair in value:
        first, second = pair
        pairs.append((read_float(first), read_float(second)))
    return tuple(pairs)


def type_in_words(kind):
    """Say what a field of a type takes."""
    if typing.get_origin(kind) is typing.Union:
        kind = typing.get_args(kind)[0]
    words = {
        list: "a list such as [a, b]",
        tuple: "a list of pairs such as [[0.2, 0], [0, 0.05]]",
        float: "a number",
        int: "a whole number",
        bool: "true or false",
        str: "a text that isn't empty",
    }
    return words[typing.get_origin(kind) or kind]
