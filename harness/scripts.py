"""The algorithms' scripts. They are found, not listed: an algorithm of your own is just a file."""

import glob
import importlib.util
import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def script_names():
    """Return the names of the top level's scripts that define an algorithm's NAME, ReBRAC first."""
    names = []
    for path in glob.glob(os.path.join(ROOT, "*.py")):
        with open(path) as file:
            if re.search(r"^NAME = ", file.read(), re.MULTILINE):
                names.append(os.path.basename(path).removesuffix(".py"))
    return sorted(names, key=lambda name: (name != "rebrac", name))


def load_script(name):
    """Import the script `name` of the top level, whatever the working directory is."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, os.path.join(ROOT, f"{name}.py"))
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def scripts():
    """Return the algorithms' modules by the names of their files, {"rebrac": <module>, ...}."""
    return {name: load_script(name) for name in script_names()}
