"""The algorithms' scripts. They are found, not listed: an algorithm of your own is just a file."""

import functools
import glob
import importlib.util
import os
import re
import sys

from harness.config import check, given_values, read_flags
from harness.datasets import with_checksum
from harness.errors import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# A file that has all of these is a script. Others are never imported.
PROVIDES = (r"^NAME = ", r"^class Config\b", r"^def tuned\(", r"^def main\(")


@functools.cache  # a sweep asks for each of its runs
def names_in(folder):
    """Return the names of a folder's files that define an algorithm, ReBRAC first."""
    names = []
    for path in glob.glob(os.path.join(glob.escape(folder), "*.py")):
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read()
        if all(re.search(pattern, text, re.MULTILINE) for pattern in PROVIDES):
            names.append(os.path.basename(path).removesuffix(".py"))
    return sorted(names, key=lambda name: (name != "rebrac", name))


def load_script(name):
    """Import the script `name` of the top level, whatever the working directory is."""
    if name not in sys.modules:
        path = os.path.join(ROOT, f"{name}.py")
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]  # it is half made
            raise
    return sys.modules[name]


def scripts():
    """Return the algorithms' modules by the names of their files, {"rebrac": <module>, ...}.

    Raises UserError if two have one NAME, by which tables tell them apart.
    """
    found = {name: load_script(name) for name in names_in(ROOT)}
    files = {}  # NAME -> file
    for name, script in found.items():
        other = files.setdefault(script.NAME, f"{name}.py")
        if other != f"{name}.py":
            raise UserError(f'{name}.py has the NAME "{script.NAME}" of {other}; give it its own')
    return found


def read_config(script, words, add_checksum=with_checksum):
    """Return the config of a sweep's run, given its flags as a list of words.

    `add_checksum` adds its dataset's checksum. A plan has one that downloads nothing.
    """
    config = script.tuned(read_flags(script.Config, words))
    if config.evaluate or config.video:
        raise UserError("a sweep only trains; give --evaluate and --video to a script")
    check(config, script.constraints, script.BOUNDS, given_values(script.Config, words))
    return add_checksum(config)
