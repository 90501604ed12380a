"""The command line: from words to a Config, and what must hold of it."""

import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import os
import re
import sys
import types
from typing import Optional

import jax
import pyrallis
import yaml

from harness.environments import registered_names
from harness.errors import UserError, one_line
from harness.values import read_value, type_in_words

SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a report reads thousands of configs


class WordLoader(SafeLoader):
    """Reads YAML's words as they stand, but null as None. So 010 is not 8, and yes is not true."""


WordLoader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag == "tag:yaml.org,2002:null"]
    for letter, resolvers in SafeLoader.yaml_implicit_resolvers.items()
}

# --- pyrallis: the parser and its help ---


@functools.cache
def source_lines(config_class):
    return inspect.getsource(config_class).splitlines()


def inline_comment(config_class, field_name):
    """Return a field's help: the comment beside it.

    pyrallis prefers the lines above a field, which here are headings, and reads the source anew
    for each field, which takes seconds.
    """
    for line in source_lines(config_class):
        name, _, rest = line.partition(":")
        if name.strip() == field_name:
            comment = rest.partition("#")[2].strip()
            return pyrallis.wrappers.docstring.AttributeDocString(comment_inline=comment)
    return pyrallis.wrappers.docstring.AttributeDocString()


pyrallis.wrappers.docstring.get_attribute_docstring = inline_comment


class Parser(pyrallis.argparsing.ArgumentParser):
    """pyrallis's parser, which gives the words of the flags that are there, {name: word}."""

    def __init__(self, config_class):
        super().__init__(config_class, allow_abbrev=False)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # -1e-3 is a value and no flag

    def _postprocessing(self, parsed_args):
        return vars(parsed_args)

    def error(self, message):
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        if not unknown:
            raise UserError(one_line(message))
        flag = unknown[1].partition("=")[0]
        names = [f"--{field.name}" for field in dataclasses.fields(self.config_class)]
        near = difflib.get_close_matches(flag, names, n=3, cutoff=0.5)
        advice = f"the nearest are {', '.join(near)}" if near else "--help lists them"
        raise UserError(f"there is no flag {flag}; {advice}")


@functools.cache  # since a sweep reads thousands of configs
def parser(config_class, for_help):
    """Return a parser. --help has its own: one that has read words no longer shows defaults."""
    for field in dataclasses.fields(config_class):
        if isinstance(field.type, types.UnionType):
            raise UserError(f"{field.name}: write Optional[X] in place of X | None")
    return Parser(config_class)


# --- Reading a config ---

SHORTHANDS = ("preset", "regularisers")  # fields that stand for others
FLAGS_INSTEAD = "give the flags that the name stands for instead"


def parse(config_class, arguments=None):
    """Return the config of the command line, or of the words in `arguments`.

    Also sets what JAX must know before it uses a device. Raises UserError for a wrong value.
    """
    config = read_flags(config_class, arguments)
    configure_jax(getattr(config, "deterministic", False))
    return config


def read_flags(config_class, arguments=None):
    """Do as `parse`, but leave JAX alone, for a process that only reads the configs of others."""
    words = given_words(config_class, arguments)
    return config_class(**{**file_values(config_class, words), **word_values(config_class, words)})


def given_values(config_class, arguments=None):
    """Return the fields that are asked for, {name: value}.

    Of the command line these are all. Of a config file they are those that are on, since a run's
    own config.yaml lists every field.
    """
    words = given_words(config_class, arguments)
    values = file_values(config_class, words)
    on = {name: value for name, value in values.items() if not is_off(value)}
    return {**on, **word_values(config_class, words)}


def is_off(value):
    return value in (None, 0, "none")  # and False, which is 0


def file_values(config_class, words):
    """Return the fields in the config file that is given, {name: value}."""
    path = words.get("config_path")
    if path is None:
        return {}
    try:
        return decode(config_class, read_yaml(path, WordLoader))
    except UserError as error:
        raise UserError(f"config_path {path!r}: {error}") from error


def word_values(config_class, words):
    """Return the fields that the command line itself gives, {name: value}."""
    return decode(config_class, {key: word for key, word in words.items() if key != "config_path"})


def given_words(config_class, arguments=None):
    """Return the words of the flags that are given, {name: word}."""
    words = sys.argv[1:] if arguments is None else arguments
    if os.getenv("WANDB_SWEEP_ID"):
        words = [word for word in words if not is_wandbs_own(word)]
    words = ["--help" if word == "-h" else word for word in words]  # pyrallis knows --help alone
    return dict(parser(config_class, "--help" in words).parse_args(words))


def is_wandbs_own(word):
    """Return whether a word of W&B's agent is to be left out.

    W&B hands out a preempted run again with its whole logged config as flags. That has also W&B's
    own entries and the algorithm's name, and fields that are None, as --key=None.
    """
    return word.endswith("=None") or word.startswith(("--_wandb", "--algorithm="))


def read_yaml(path, loader=SafeLoader):
    """Return the dictionary in a YAML file."""
    try:
        with open(path, encoding="utf-8") as file:
            fields = yaml.load(file, loader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"can't be read ({one_line(error)})") from error
    if not isinstance(fields, dict):
        raise UserError("it holds no fields; it must have lines such as `seed: 0`")
    return fields


def decode(config_class, fields):
    """Return a dictionary of fields with each value in its field's type."""
    types = {field.name: field.type for field in dataclasses.fields(config_class)}
    values = {}
    for name, value in fields.items():
        if name not in types:
            raise UserError(f"there is no field {name!r}; --help lists them")
        try:
            values[name] = read_value(types[name], value)
        except (ValueError, TypeError, SyntaxError, OverflowError) as error:
            kind = type_in_words(types[name])
            raise UserError(f"{name} can't be {value!r}; it must be {kind}") from error
    return values


def configure_jax(deterministic):
    """Tell JAX what it must know before it uses a device.

    Compiled programs are kept on disk. A CPU computes in the thread that calls, which halves the
    time of a policy's call. A GPU's memory is taken as it is needed. Its operations are
    deterministic if so asked, as a CPU's always are.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = os.path.expanduser("~/.cache/jax")
        with contextlib.suppress(OSError):  # a home that can't be written to goes without
            os.makedirs(cache, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    flags = os.getenv("XLA_FLAGS", "")
    deterministic_ops = "--xla_gpu_deterministic_ops=true"
    if deterministic and deterministic_ops not in flags:  # a notebook may parse more than once
        os.environ["XLA_FLAGS"] = f"{flags} {deterministic_ops}"


# --- What must hold ---

HOLDS = {  # a bound in words -> whether a number keeps it
    "any number": lambda x: True,
    "0 or more": lambda x: x >= 0,
    "1 or more": lambda x: x >= 1,
    "2 or more": lambda x: x >= 2,
    "above 0": lambda x: x > 0,
    "above -1": lambda x: x > -1,
    "at least 0 and below 1": lambda x: 0 <= x < 1,
    "between 0 and 1": lambda x: 0 <= x <= 1,
}


def check(config, constraints, bounds, given=None):
    """Raise UserError if a field makes no sense, before any work.

    `bounds` maps fields to words of HOLDS. Without one an int must be 1 or more and a float 0 or
    more. `constraints(config)` maps messages to whether they hold. `given` are the
    values that were asked for, {name: value}. The config must still have them.
    """
    for name, value in (given or {}).items():
        if name in SHORTHANDS or getattr(config, name) == value:
            continue
        names = " and ".join(f"{key} {given[key]}" for key in SHORTHANDS if key in given)
        own = getattr(config, name)
        raise UserError(f"{names} has {name} {own}, but {value} is asked for, too; {FLAGS_INSTEAD}")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if type(value) not in (int, float):  # a bool is an int, too
            continue
        is_whole = field.type in (int, Optional[int])  # a fork may write `actor_x: float = 0`
        bound = bounds.get(field.name, "1 or more" if is_whole else "0 or more")
        if not HOLDS[bound](value):
            raise UserError(f"{field.name} must be {bound}")
    for message, holds in {**run_constraints(config), **constraints(config)}.items():
        if not holds:
            raise UserError(message)


def run_constraints(config):
    """Return what must hold of the fields that the harness reads: message -> whether it holds."""
    noise_is_right = all(min(pair) >= 0 and max(pair) > 0 for pair in config.eval_noise)
    video = config.video or ""
    folder = os.path.dirname(video) or "."
    known = registered_names()
    is_known = config.dataset_name in known
    near = ""
    if not is_known:  # else it would only take time
        near = ", ".join(difflib.get_close_matches(config.dataset_name, known, n=3, cutoff=0))
    return {
        f"unknown dataset {config.dataset_name!r}; the nearest names are {near}": is_known,
        f"num_updates must be a multiple of log_every, {config.log_every}": (
            config.num_updates % config.log_every == 0
        ),
        f"eval_every must be a multiple of log_every, {config.log_every}": (
            config.eval_every % config.log_every == 0
        ),
        "eval_noise must be pairs of 0 or more, not both 0: [[0.2, 0], [0, 0.05]]": noise_is_right,
        "seed + num_seeds must be at most 2^31": config.seed + config.num_seeds <= 2**31,
        "video must end in .mp4 or .gif": not video or video.endswith((".mp4", ".gif")),
        f"video: there is no directory {folder}": os.path.isdir(folder),
        "video needs --evaluate RUN, whose policy it shows": not video or bool(config.evaluate),
    }


# --- Names for fields ---


def with_regularisers(config, known, combined=None, presets=None):
    """Set the fields that the config's `regularisers` and `preset` stand for, and these to none.

    `regularisers` is none, or names of `known` joined by +. `combined` has the flags that are
    others in a combination: {"DO+LN+L2": {"actor_wd": 1e-4}}. `preset` is none, or a name of
    `presets`. Raises UserError if a name is unknown, or if names or fields contradict each other.
    A field that is off contradicts nothing here; `check` knows whether it was asked for.
    """
    flags = regulariser_flags(config.regularisers, known, combined or {})
    preset = getattr(config, "preset", "none")
    presets = {"none": {}, **(presets or {})}
    if preset not in presets:
        raise UserError(f"unknown preset {preset!r}; known: {', '.join(presets)}")
    given = {name: getattr(config, name, "none") for name in SHORTHANDS}
    names = " and ".join(f"{name} {value}" for name, value in given.items() if value != "none")
    for key, value in flags.items():
        if presets[preset].get(key, value) != value:
            raise UserError(f"{names} contradict each other about {key}")
    values = decode(type(config), {**presets[preset], **flags})
    for key, value in values.items():
        own = getattr(config, key)
        if own not in (getattr(type(config), key), value) and not is_off(own):
            raise UserError(
                f"{names} has {key} {value}, but {own} is asked for, too; {FLAGS_INSTEAD}"
            )
    unnamed = {name: "none" for name in SHORTHANDS if hasattr(config, name)}
    return dataclasses.replace(config, **unnamed, **values)


def regulariser_flags(regularisers, known, combined):
    """Return the flags that names joined by + stand for."""
    if regularisers == "none":
        return {}
    flags = {}
    names = regularisers.split("+")
    for name in names:
        if name not in known:
            raise UserError(
                f"unknown regulariser {name!r}; known: none, or {', '.join(known)}, "
                "joined by + such as DO+LN"
            )
        for key, value in known[name].items():
            if flags.get(key, value) != value:
                raise UserError(f"regularisers {regularisers} contradict each other about {key}")
            flags[key] = value
    for combination, others in combined.items():
        if set(combination.split("+")) == set(names):
            flags |= others
    return flags


def read_table(text):
    """Read a table in a string, whose first row names its columns and whose first column its rows.

    >>> read_table("name  x    y\\nfirst 0.5  True")
    {"first": {"x": 0.5, "y": True}}
    """
    header, *rows = [line.split() for line in text.strip().splitlines()]
    table = {}
    for name, *words in rows:
        values = [ast.literal_eval(word) for word in words]
        table[name] = dict(zip(header[1:], values, strict=True))
    return table
