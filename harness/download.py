"""Downloads of D4RL's files, which go on after a break and are checked."""

import contextlib
import csv
import fcntl
import hashlib
import http.client
import io
import itertools
import os
import sys
import tempfile
import time
import urllib.error
import urllib.request

from tqdm import tqdm

from harness.errors import UserError, disk_errors, one_line
from harness.hdf5 import SIGNATURE, content, open_hdf5

# Has the 24 files of D4RL's gym_mujoco_v2
SECOND_SOURCE = (
    "https://huggingface.co/datasets/imone/D4RL/resolve/9ed58d8a76c12f4c1cb5db51fa71389e703d2ec5"
)
SUMS = os.path.join(os.path.dirname(__file__), "d4rl_files.csv")
TIMEOUT = 30  # seconds without an answer
WAITS = (1, 2, 4, 8, 16)  # seconds before each further try
LINE_EVERY = 30  # seconds, where there is no progress bar


class Refused(Exception):
    """A server doesn't have the file."""


class Broken(Exception):
    """A server or the connection has failed, so that another try may go on."""


class Unreachable(Broken):
    """No connection to the server can be made. If nothing has come yet, it isn't tried again."""


class Changed(Broken):
    """The server has another file than the one whose part is here."""


def download(url, path):
    """Download one of D4RL's files. Nothing is at `path` until the whole file is.

    After a break it goes on with NAME.part, beside it. Of several processes one downloads.
    """
    failures = []
    with disk_errors(path, "mend that, or name another folder in D4RL_DATASET_DIR"):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with locked_part(path) as (part, lock):
            if os.path.exists(path):  # by now, thanks to another process
                return
            for source in sources(url):
                print(f"downloading {source} to {path}", flush=True)
                try:
                    receive_all(source, part, lock)
                    warn_if_unknown(part, os.path.basename(path))
                    os.replace(part, path)
                    return
                except (Broken, Refused) as error:
                    failures.append(f"{source} ({error})")
    raise UserError(
        f"can't download {' or '.join(failures)}; try again, get it by hand and put it at {path}, "
        "or use --dataset_path, or D4RL_DATASET_URL for a mirror"
    )


def sources(url):
    """Return the URLs from which a file can be had, in the order in which they are tried."""
    name = url.rpartition("/")[2]
    mirror = os.environ.get("D4RL_DATASET_URL")
    if mirror:
        return [f"{mirror.rstrip('/')}/{name}"]
    if "/gym_mujoco_v2/" in url:
        return [url, f"{SECOND_SOURCE}/{name}"]
    return [url]


# --- The part that has come ---


@contextlib.contextmanager
def locked_part(path):
    """Yield the path of a file's part, and its lock file, which holds the part's version.

    Both stay until the part is whole and renamed. On a disk without locks they are temporary.
    """
    part = f"{path}.part"
    lock = open_locked(f"{part}.lock")
    if lock is None:
        with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder:
            yield os.path.join(folder, "part"), io.StringIO()
        return
    with lock:
        try:
            yield part, lock
        finally:
            if not os.path.exists(part):
                remove(lock.name)


def open_locked(path):
    """Open and lock a file, after any other process that has it. Return None without locks."""
    while True:
        lock = open(path, "a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that has {path}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            lock.close()
            remove(path)
            return None
        if os.fstat(lock.fileno()).st_nlink:  # otherwise the other process has removed it
            return lock
        lock.close()


def size(part):
    """Return how many bytes have come."""
    return os.path.getsize(part) if os.path.exists(part) else 0


def remove(path):
    """Remove a file if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


# --- What comes ---


def receive_all(source, part, lock):
    """Download a file into its part. After a break try again, for as long as that gets further."""
    start = largest = size(part)
    waits = list(WAITS)
    while True:
        try:
            return receive(source, part, lock)
        except Broken as error:
            if isinstance(error, Changed):
                remove(part)
            if size(part) > largest:
                largest = size(part)
                waits = list(WAITS)
            if not waits or (isinstance(error, Unreachable) and largest == start):
                raise
            print(f"{error}; trying again in {waits[0]} s", flush=True)
            time.sleep(waits.pop(0))


def receive(source, part, lock):
    """Download a file, or what is missing of it, into its part."""
    received = size(part)
    lock.seek(0)
    version = lock.read()
    headers = {}
    if received and version:
        headers = {"Range": f"bytes={received}-", "If-Range": version}
    response = open_url(source, headers, received)
    if response is None:
        check_is_whole(part)
        return
    with response:
        is_rest = response.status == 206
        if is_rest and not continues(response.headers, received, version):
            raise Changed("the file there has changed")
        length = getattr(response, "length", None)
        blocks = read_blocks(response)
        first = next(blocks, b"")
        if is_rest:
            print(f"going on after {received / 1e6:,.0f} MB", flush=True)
        elif first.startswith(SIGNATURE):
            received = 0
            version = version_of(response.headers)
        else:
            raise Refused(f"what it sends is {content(first)}")
        total = None if length is None else received + length
        with open(part, "ab" if is_rest else "wb") as file:
            lock.seek(0)
            lock.truncate()
            lock.write(version)
            lock.flush()
            for block in with_progress(itertools.chain([first], blocks), received, total):
                file.write(block)
    if total is not None and size(part) < total:
        raise Broken(f"broken off after {size(part):,} of {total:,} bytes")
    check_is_whole(part)


def open_url(source, headers, received):
    """Ask a server for a file. Return None if what was received is all of it."""
    try:
        request = urllib.request.Request(source, headers=headers)
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except (ValueError, http.client.InvalidURL) as error:
        raise Refused(one_line(error)) from error
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing follows what was received
            if error.headers.get("Content-Range") == f"bytes */{received}":
                return None
            raise Changed("the file there has changed") from error
        kind = Broken if error.code in (408, 429) or error.code >= 500 else Refused
        raise kind(f"HTTP {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise Unreachable(one_line(error.reason)) from error
    except (OSError, http.client.HTTPException) as error:
        raise Broken(one_line(error)) from error


def read_blocks(response):
    """Yield what a server sends."""
    try:
        while block := response.read(2**16):
            yield block
    except (OSError, http.client.HTTPException) as error:
        raise Broken(one_line(error)) from error


def with_progress(blocks, received, total):
    """Pass blocks on, and show how much has come: on a terminal by a bar, otherwise by lines."""
    has_bar = sys.stderr.isatty()
    shown_at = time.monotonic()
    with tqdm(
        total=total,
        initial=received,
        unit="B",
        unit_scale=True,
        disable=not has_bar,
        leave=False,
    ) as bar:
        for block in blocks:
            yield block
            received += len(block)
            bar.update(len(block))
            if not has_bar and time.monotonic() - shown_at >= LINE_EVERY:
                shown_at = time.monotonic()
                end = "" if total is None else f" of {total / 1e6:,.0f}"
                print(f"{received / 1e6:,.0f}{end} MB", flush=True)


def version_of(headers):
    """Return what identifies this version of the file: its ETag, its date, or nothing."""
    tag = headers.get("ETag", "")
    if tag.startswith('"'):  # a weak one, W/"...", doesn't tell bytes apart
        return tag
    return headers.get("Last-Modified", "")


def continues(headers, received, version):
    """Return whether a server's answer is the rest of the version of which a part is here."""
    is_next = headers.get("Content-Range", "").startswith(f"bytes {received}-")
    return is_next and version_of(headers) in ("", version)


def check_is_whole(part):
    """Remove a part that is no whole HDF5 file, and raise Refused."""
    try:
        open_hdf5(part).close()
    except OSError as error:
        remove(part)
        raise Refused(f"what it sends is no whole HDF5 file: {one_line(error)}") from error


def known_files():
    """Return D4RL's files: rows of bytes and checksum by their names."""
    with open(SUMS, newline="", encoding="utf-8") as file:
        return {row["file"]: row for row in csv.DictReader(file)}


def warn_if_unknown(part, name):
    """Warn if a file isn't the one that D4RL's server had when its checksum was taken."""
    known = known_files()
    if name not in known:
        return
    with open(part, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != known[name]["sha256"]:
        print(
            f"warning: {name} has {size(part)} bytes and the SHA-256 {found}, but D4RL's had "
            f"{known[name]['bytes']} bytes and {known[name]['sha256']}",
            flush=True,
        )
