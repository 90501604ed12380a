"""Loading: MuJoCo 2.1.0's reading of an XML file."""

import copy
import functools
import os
import re
import xml.etree.ElementTree as ET

import mujoco
import numpy as np

VISUALS = True  # whether models get what is only drawn: most of their memory


def load_model_from_path(path):
    """Compile the XML file at `path` into a `mujoco.MjModel` that moves as in MuJoCo 2.1.0."""
    path = os.path.abspath(path)
    folder = os.path.dirname(path)
    root = _inline(ET.parse(path).getroot(), folder)
    for option in root.iter("option"):
        option.attrib.pop("apirate", None)  # unknown today; it never mattered to the simulation
    for compiler in root.iter("compiler"):
        if compiler.attrib.pop("coordinate", "local") == "global":
            for body in root.findall("worldbody/body"):
                _to_local(body, np.zeros(3))
        for key in ("meshdir", "texturedir"):
            if key in compiler.attrib:
                compiler.set(key, os.path.join(folder, compiler.get(key)))
    if not VISUALS:
        ET.SubElement(root, "compiler", discardvisual="true")
        for element in root.iter():
            element.attrib.pop("material", None)
    model = _compile(ET.tostring(root, encoding="unicode"))
    return copy.copy(model)  # environments write to their models


@functools.lru_cache(maxsize=8)
def _compile(xml):
    """Compile `xml` and give its capsules the inertia that they had in MuJoCo 2.1.0."""
    model = mujoco.MjModel.from_xml_string(xml)
    spec = mujoco.MjSpec.from_string(xml)
    for geom in spec.geoms:
        if geom.type == mujoco.mjtGeom.mjGEOM_CAPSULE:
            _to_cylinder(geom)
    cylinders = spec.compile()
    for field in ("body_mass", "body_inertia", "body_ipos", "body_iquat"):
        getattr(model, field)[:] = getattr(cylinders, field)
    mujoco.mj_setConst(model, mujoco.MjData(model))
    return model


def _to_cylinder(geom):
    """Turn a capsule of radius r into the cylinder whose inertia MuJoCo 2.1.0 gave to it.

    Its radius is r, too, and its half-length that of the capsule plus r / 2.
    """
    geom.type = mujoco.mjtGeom.mjGEOM_CYLINDER
    radius = geom.size[0]
    if np.isnan(geom.fromto[0]):
        geom.size[1] += radius / 2
        return
    start = geom.fromto[:3].copy()
    end = geom.fromto[3:].copy()
    extra = radius / 2 * (end - start) / np.linalg.norm(end - start)
    geom.fromto = np.concatenate([start - extra, end + extra])


def _inline(element, folder):
    """Replace every <include> below `element` by the contents of the file that it names."""
    children = []
    for child in element:
        if child.tag == "include":
            included = ET.parse(os.path.join(folder, child.get("file"))).getroot()
            children += _inline(included, folder)
        else:
            children.append(_inline(child, folder))
    element[:] = children
    return element


def _to_local(body, parent):
    """Rewrite the positions in `body` from world coordinates to those of the body around them.

    `parent` is the position (3,) of the body around `body`. No body in global coordinates is
    rotated.
    """
    here = _numbers(body.get("pos", "0 0 0"))
    body.set("pos", _text(here - parent))
    for child in body:
        if child.tag == "body":
            _to_local(child, here)
        elif "fromto" in child.attrib:
            child.set("fromto", _text(_numbers(child.get("fromto")) - np.tile(here, 2)))
        elif "pos" in child.attrib:
            child.set("pos", _text(_numbers(child.get("pos")) - here))


def _numbers(text):
    """Read numbers as MuJoCo 2.1.0 did: up to the first odd character, and then zeros.

    hopper.xml has "0.13/2 0 0.1", which means 0.13 0 0.
    """
    tokens = text.split()
    values = np.zeros(len(tokens))
    for i, token in enumerate(tokens):
        number = re.match(r"[-+]?[\d.]+(e[-+]?\d+)?", token, re.IGNORECASE)[0]
        values[i] = float(number)
        if number != token:
            break
    return values


def _text(numbers):
    return " ".join(map(repr, numbers.tolist()))
