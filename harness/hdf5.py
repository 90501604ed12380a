"""Reads and writes HDF5 files, and says what a file is that isn't in D4RL's layout."""

import errno
import os

import h5py
import numpy as np

from harness.errors import UserError, disk_errors, one_line

SIGNATURE = b"\x89HDF\r\n\x1a\n"  # with which HDF5 files begin
OTHER_SIGNATURES = {
    b"<": "a web page",
    b"version https://git-lfs": "a pointer of Git LFS (`git lfs pull` gets the file)",
    b"PK": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
}
OTHER_LAYOUTS = {  # a group -> the datasets that have it
    "episode_0": "a Minari dataset",
    "steps": "an RLDS dataset",
    "data/demo_0": "a robomimic dataset",
}


def check_readable(path):
    """Raise UserError unless there is a file at a path and it may be read."""
    try:
        os.stat(path)
        if not os.path.isfile(path):
            raise UserError(f"{path} is a folder or a device, not a file")
        open(path, "rb").close()
    except FileNotFoundError as error:
        link = f": it is a link to {os.readlink(path)}" if os.path.islink(path) else ""
        raise UserError(f"there is no file {path}{link}") from error
    except OSError as error:
        raise UserError(f"can't read {path} ({error.strerror})") from error


def read_columns(path, keys):
    """Return the arrays that `keys` names; timeouts may be missing.

    Raises UserError if they can't be read, or if the file's layout is not D4RL's.
    """
    check_readable(path)
    try:
        with open_hdf5(path) as file:
            check_layout(path, file, keys)
            return {key: read_column(path, file, key) for key in keys if key in file}
    except UserError:
        raise
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} {problem(path, error)}") from error


def write_columns(path, columns, attributes, level):
    """Write arrays and attributes, compressed by gzip of a level. A part is never at `path`.

    Raises UserError if they can't be written.
    """
    options = dict(compression="gzip", compression_opts=level, shuffle=True)
    with disk_errors(path):
        try:
            with h5py.File(f"{path}.partial", "w") as file:
                for key, column in columns.items():
                    file.create_dataset(key, data=column, **options)
                file.attrs.update(attributes)
        except RuntimeError as error:  # a full disk, when the file is closed
            raise OSError(one_line(error)) from error
        os.replace(f"{path}.partial", path)


def open_hdf5(path):
    """Open an HDF5 file to read it, also on a disk without locks."""
    try:
        return h5py.File(path, "r")
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        return h5py.File(path, "r", locking=False)


def problem(path, error):
    """Return in words what an error of h5py's says of a file."""
    text = one_line(error)
    if isinstance(error, BlockingIOError):
        return "is open in a process that writes to it; try again when it is closed there"
    if "already open for write" in text:
        return "was left open by a process that wrote to it; if that has ended, h5clear -s mends it"
    if "signature not found" in text:
        with open(path, "rb") as file:
            return f"is {content(file.read(32))}"
    if "truncated file" in text:
        return f"is cut off ({text}); get it again"
    return f"is damaged, or no file that h5py can read ({text}); get it again"


def content(beginning):
    """Say what a file that isn't HDF5 is, by its first bytes."""
    for signature, name in OTHER_SIGNATURES.items():
        if beginning.startswith(signature):
            return f"{name}, not an HDF5 file"
    return "not an HDF5 file" if beginning else "an empty file"


def check_layout(path, file, keys):
    """Raise UserError if a file has another layout than D4RL's."""
    missing = [key for key in keys if key not in file and key != "timeouts"]
    if not missing:
        return
    layout = f"D4RL's layout is {', '.join(keys)}: an array of all steps for each"
    for group, name in OTHER_LAYOUTS.items():
        if group in file:
            raise UserError(f"{path} is {name} (it has {group}); {layout}")
    found = ", ".join(array_names(file)) or "no array"
    raise UserError(f"{path} has no {missing[0]!r} (it has {found}); {layout}")


def array_names(group):
    """Return the names of the first eight arrays in a group, and in the groups in it."""
    names = []

    def add(name, item):
        if isinstance(item, h5py.Dataset):
            names.append(name)
        return True if len(names) == 8 else None  # True ends it

    group.visititems(add)
    return names


def read_column(path, file, key):
    """Return an array of a file, or raise UserError if it is none or is not all there."""
    link = file.get(key, getlink=True)
    if not isinstance(link, h5py.HardLink) and file.get(key) is None:
        target = f"{link.path} in {getattr(link, 'filename', path)}"
        raise UserError(
            f"{key} in {path} is a link to {target}, which isn't there or can't be read"
        )
    column = file[key]
    if not isinstance(column, h5py.Dataset):
        origin = ", as in Gymnasium-Robotics," if "achieved_goal" in column else ""
        raise UserError(
            f"{key} in {path} is a group ({', '.join(column)}){origin} where D4RL has one array"
        )
    for name in other_files(column):
        beside = os.path.join(os.path.dirname(path), name)
        if not os.path.exists(name) and not os.path.exists(beside):
            raise UserError(f"{key} in {path} has data in {name}, which isn't there")
    properties = column.id.get_create_plist()
    for i in range(properties.get_nfilters()):
        number = properties.get_filter(i)[0]
        if not h5py.h5z.filter_avail(number):
            raise UserError(
                f"{key} in {path} is compressed by HDF5's filter {number}, which h5py lacks; "
                "compress it by gzip"
            )
    return np.asarray(column[()])


def other_files(column):
    """Return the names of the other files in which an array has data.

    HDF5 itself reads zeros where a part of a virtual array isn't there.
    """
    names = [name for name, _, _ in column.external or ()]
    if column.is_virtual:
        names += [source.file_name for source in column.virtual_sources()]
    return names
