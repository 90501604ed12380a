"""Downloads of D4RL's files, from a server on loopback that fails in all the ways of servers."""

import csv
import errno
import fcntl
import functools
import hashlib
import http.server
import io
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import BUNDLED, ROOT
from runs_helpers import fails
from tqdm import tqdm

import rebrac
from harness import datasets, download
from harness.datasets import dataset_file
from harness.environments import d4rl, gym
from tools import sweep

NAME = "halfcheetah_medium_replay-v2.hdf5"
OTHER = os.path.join(ROOT, "data", "hopper_medium-v2.hdf5")
PAGE = b"<html>Please log in</html>"


class Server(http.server.ThreadingHTTPServer):
    """A web server that answers requests in turn as `plan` says; its last word holds from then on.

    whole       the file, or the rest that is asked for
    cut         the first half of that
    unasked     the file, whatever is asked for
    rest        the rest that is asked for, of whatever version
    start       the file, as the part that was asked for
    chunked     the first half, without saying how much is to come
    long        less than the length that it names
    short       the first half, as if that was all
    close       nothing
    stall       the first half, and nothing for a minute
    416 whole   that nothing follows the whole file
    page        a web page
    moved       a redirection to the file
    404, 503    an error of that number
    """

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.content = content
        self.tag = '"first"'
        self.plan = ["whole"]
        self.asked = []  # pairs of the path and where in the file to begin

    def handle_error(self, request, client_address):
        pass  # a client that has gone


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.close_connection = True
        server = self.server
        word = server.plan.pop(0) if len(server.plan) > 1 else server.plan[0]
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))
        first = int(found[1])
        server.asked.append((self.path, first))
        if word == "416 whole":
            total = len(server.content)
            self.answer(416, b"", {"Content-Range": f"bytes */{total}", "Content-Length": 0})
        elif word.isdigit():
            self.send_error(int(word))
        elif word == "page":
            self.answer(200, PAGE, {"Content-Length": len(PAGE)})
        elif word == "moved":
            self.answer(302, b"", {"Location": f"{server.url}/moved", "Content-Length": 0})
        elif word != "close":
            if word in ("unasked", "start") or (
                word != "rest" and self.headers["If-Range"] != server.tag
            ):
                first = 0
            self.send_file(word, first)

    def send_file(self, word, first):
        content = self.server.content[first:]
        half = content[: len(content) // 2]
        headers = {"ETag": self.server.tag, "Content-Length": len(content)}
        if first or word == "start":
            size = len(self.server.content)
            headers["Content-Range"] = f"bytes {first}-{size - 1}/{size}"
        if word in ("cut", "stall"):
            content = half
        elif word == "chunked":
            del headers["Content-Length"]
            headers["Transfer-Encoding"] = "chunked"
            content = b"%x\r\n" % len(content) + half
        elif word == "long":
            headers["Content-Length"] += 10
        elif word == "short":
            headers["Content-Length"] = len(half)
            content = half
        self.answer(206 if "Content-Range" in headers else 200, content, headers)
        if word == "stall":
            self.server.stalled.wait(60)

    def answer(self, status, content, headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def content():
    with open(BUNDLED, "rb") as file:
        return file.read()


@pytest.fixture
def server(content, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "D4RL_DATASET_URL"):
        monkeypatch.delenv(name, raising=False)
    with Server(content) as server:
        server.stalled = threading.Event()
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        monkeypatch.setattr(download, "SECOND_SOURCE", f"{server.url}/second")
        monkeypatch.setattr(download, "WAITS", (0, 0, 0))
        yield server
        server.stalled.set()
        server.shutdown()


@pytest.fixture
def get(server, tmp_path):
    """Download the file; return what is at its path."""

    def get(folder="adroit"):
        path = tmp_path / "cache" / NAME
        download.download(f"{server.url}/{folder}/{NAME}", str(path))
        assert os.listdir(path.parent) == [NAME]
        return path.read_bytes()

    return get


@pytest.fixture
def part(server, get, tmp_path):
    """The part that a first try has left, of a file that a server broke off."""
    server.plan = ["cut", "404"]
    fails("404", get)
    server.asked.clear()
    return tmp_path / "cache" / f"{NAME}.part"


# --- Breaks ---


def test_a_download_goes_on_after_a_break(server, get, content):
    server.plan = ["cut", "close", "503", "cut", "cut", "whole"]
    assert get() == content
    size = len(content)
    starts = [first for _, first in server.asked]
    assert starts[:4] == [0, size // 2, size // 2, size // 2]
    assert size * 0.74 < starts[4] < size * 0.76
    assert size * 0.86 < starts[5] < size * 0.88


def test_the_next_process_goes_on(server, get, part, content):
    assert part.read_bytes() == content[: len(content) // 2]
    server.plan = ["whole"]
    assert get() == content
    assert server.asked == [(f"/adroit/{NAME}", len(content) // 2)]


@pytest.mark.parametrize("word", ["whole", "unasked", "rest"])
def test_a_file_that_has_changed_is_not_glued_to_the_old_part(server, get, part, word):
    with open(OTHER, "rb") as file:
        server.content = file.read()
    server.tag = '"second"'
    server.plan = [word]
    assert get() == server.content


def test_a_part_that_is_longer_than_the_file_is_not_kept(server, get, part, content):
    server.plan = ["416", "whole"]
    assert get() == content


def test_a_part_that_is_whole_already_is_not_asked_for_again(server, get, part, content):
    """A process may be killed between its last byte and the file's checksum."""
    part.write_bytes(content)
    server.plan = ["416 whole"]
    assert get() == content
    assert server.asked == [(f"/adroit/{NAME}", len(content))]


def test_another_part_than_the_one_asked_for_is_not_taken(server, get, part, content):
    server.plan = ["start", "whole"]
    assert get() == content


@pytest.mark.parametrize("tag", ["", 'W/"weak"'])
def test_without_a_version_a_download_starts_over(server, get, content, tag):
    server.tag = tag
    server.plan = ["cut", "whole"]
    assert get() == content
    assert [first for _, first in server.asked] == [0, 0]


def test_a_redirection_is_followed_after_a_break_too(server, get, content):
    server.plan = ["moved", "cut", "moved", "whole"]
    assert get() == content
    assert server.asked[3] == ("/moved", len(content) // 2)


@pytest.mark.parametrize("word", ["cut", "chunked", "long", "close", "503", "416"])
def test_tries_come_to_an_end(server, get, word, tmp_path):
    """Also where a server cuts off each answer at the same place."""
    server.tag = ""
    server.plan = [word]
    line = fails("can't download", get)
    assert f"{server.url}/adroit/{NAME}" in line
    assert f"put it at {tmp_path}/cache/{NAME}" in line
    assert len(server.asked) == 4
    assert NAME not in os.listdir(tmp_path / "cache")


def test_ctrl_c_keeps_the_part(server, get, content, tmp_path):
    server.plan = ["stall", "whole"]
    process = start(server, tmp_path / "cache")
    part = tmp_path / "cache" / f"{NAME}.part"
    while not part.exists() or part.stat().st_size < len(content) // 2 - 2**16:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output = process.communicate()
    assert process.returncode == -signal.SIGINT, output
    assert part.exists()
    assert get() == content
    assert server.asked[1][1] > 0


def test_a_server_that_can_not_be_reached_is_tried_once(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "WAITS", (60,))
    url = f"http://127.0.0.1:9/{NAME}"
    fails(f"can't download {url} .*refused", download.download, url, str(tmp_path / NAME))
    assert os.listdir(tmp_path) == []


# --- Other files ---


@pytest.mark.parametrize("word", ["page", "short", "404"])
def test_what_is_not_the_file_is_not_kept(server, get, word, tmp_path):
    server.plan = [word]
    message = dict(page="a web page, not an HDF5 file", short="no whole HDF5 file: .*truncated")
    fails(message.get(word, "HTTP 404"), get)
    assert len(server.asked) == 1
    assert os.listdir(tmp_path / "cache") == []


def test_a_web_page_does_no_harm_to_a_part(server, get, part, content):
    server.plan = ["page"]
    fails("a web page", get)
    assert part.read_bytes() == content[: len(content) // 2]
    server.plan = ["whole"]
    assert get() == content
    assert server.asked[-1][1] == len(content) // 2


def test_another_file_than_d4rls_is_kept_with_a_warning(server, get, content, capsys):
    assert get() == content
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert hashlib.sha256(content).hexdigest() in line
    assert f"{len(content)} bytes" in line
    assert "48d494a4770c11f48260736dec090b78bdca8375647ed4d24bfa5b6610c7f683" in line
    assert "59448533 bytes" in line


def test_d4rls_own_file_gets_no_warning(get, content, monkeypatch, tmp_path, capsys):
    sums = tmp_path / "sums.csv"
    digest = hashlib.sha256(content).hexdigest()
    sums.write_text(f"file,bytes,sha256\n{NAME},{len(content)},{digest}\n")
    monkeypatch.setattr(download, "SUMS", str(sums))
    get()
    assert "warning" not in capsys.readouterr().out


def test_the_known_sums_are_of_d4rls_files():
    names = {url.rpartition("/")[2] for url in d4rl.infos.DATASET_URLS.values()}
    with open(download.SUMS, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len({row["sha256"] for row in rows}) == 32
    for row in rows:
        assert row["file"] in names
        assert re.fullmatch("[0-9a-f]{64}", row["sha256"])
        assert int(row["bytes"]) > 1e6


def test_a_file_is_another_than_d4rls_if_its_checksum_is():
    name = "halfcheetah-medium-replay-v2"
    own = "48d494a4770c11f48260736dec090b78bdca8375647ed4d24bfa5b6610c7f683"
    assert not datasets.is_other_file(name, own)
    assert datasets.is_other_file(name, "0" * 64)
    assert not datasets.is_other_file(name, None)
    assert not datasets.is_other_file("antmaze-medium-play-v2", own)  # D4RL's isn't known
    assert not datasets.is_other_file("mine-v2", own)  # in a report of a fork's runs


# --- Sources ---


@pytest.mark.parametrize("word", ["404", "503", "close", "page", "short"])
def test_a_second_source_has_the_gym_files(server, get, content, word):
    server.plan = [word] * (1 if word in ("404", "page", "short") else 4) + ["whole"]
    assert get("gym_mujoco_v2") == content
    assert server.asked[0] == (f"/gym_mujoco_v2/{NAME}", 0)
    assert server.asked[-1] == (f"/second/{NAME}", 0)


def test_an_error_names_both_sources(server, get):
    server.plan = ["503"] * 4 + ["404"]
    message = f"/gym_mujoco_v2/{NAME} .HTTP 503 .*/second/{NAME} .HTTP 404 "
    fails(message, get, "gym_mujoco_v2")


def test_the_second_source_has_24_of_d4rls_files():
    urls = {url for url in d4rl.infos.DATASET_URLS.values() if len(download.sources(url)) == 2}
    tasks = {url.rpartition("/")[2].partition("_")[0] for url in urls}
    assert (len(urls), tasks) == (24, {"ant", "halfcheetah", "hopper", "walker2d"})


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_mirror_is_asked_alone(server, get, content, monkeypatch, slash):
    monkeypatch.setenv("D4RL_DATASET_URL", f"{server.url}/mirror{slash}")
    assert get("gym_mujoco_v2") == content
    server.plan = ["404"]
    fails("HTTP 404", download.download, f"/gym_mujoco_v2/{NAME}2", "/tmp/nothing/of/this")
    assert server.asked == [(f"/mirror/{NAME}", 0), (f"/mirror/{NAME}2", 0)]


def test_a_mirror_may_be_a_folder(server, get, content, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_URL", f"file://{os.path.dirname(BUNDLED)}")
    assert get() == content


@pytest.mark.parametrize("mirror", ["mirror/d4rl", "http://127.0.0.1:port", "file:///nowhere"])
def test_a_mirror_that_is_no_url_gets_one_line(server, get, monkeypatch, mirror):
    monkeypatch.setenv("D4RL_DATASET_URL", mirror)
    monkeypatch.setattr(download, "WAITS", (60,))
    fails(f"can't download {mirror}/{NAME}", get)


# --- Progress ---


def test_lines_without_a_terminal(server, get, part, content, monkeypatch, capsys):
    monkeypatch.setattr(download, "LINE_EVERY", 0)
    capsys.readouterr()
    server.plan = ["whole"]
    get()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"downloading {server.url}/adroit/{NAME} to ")
    assert lines[1:3] == ["going on after 3 MB", "3 of 7 MB"]
    assert "7 of 7 MB" in lines


def test_a_bar_on_a_terminal(server, get, part, monkeypatch):
    server.plan = ["whole"]

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(download, "tqdm", functools.partial(tqdm, mininterval=0))
    get()
    shown = [line for line in terminal.getvalue().split("\r") if line.strip()]
    assert " 50%" in shown[0]
    assert re.search(r" 6\.\d+M/6\.75M", shown[-1])


# --- Disks, and other processes ---


def test_a_folder_that_can_not_be_made_names_d4rl_dataset_dir(server, tmp_path):
    (tmp_path / "file").touch()
    path = str(tmp_path / "file" / NAME)
    fails(f"{tmp_path}/file.*D4RL_DATASET_DIR", download.download, server.url, path)
    assert server.asked == []


def test_a_full_disk_names_d4rl_dataset_dir_and_keeps_the_part(server, get, content, tmp_path):
    """By a limit on the size of files, which is as good."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        fails(r"can't write .*D4RL_DATASET_DIR", get)
    finally:
        signal.signal(signal.SIGXFSZ, handler)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "cache" / f"{NAME}.part").stat().st_size == 2**20
    assert get() == content
    assert server.asked[1][1] == 2**20


@pytest.mark.parametrize("is_alone", [True, False])
def test_a_disk_without_locks(server, get, content, monkeypatch, tmp_path, is_alone):
    def flock(lock, _):
        if not is_alone:
            os.remove(lock.name)
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    server.plan = ["cut", "whole"]
    assert get() == content
    assert server.asked[1][1] == len(content) // 2
    os.remove(tmp_path / "cache" / NAME)
    server.plan = ["404"]
    fails("404", get)
    assert os.listdir(tmp_path / "cache") == []


DOWNLOAD = """
import sys
from harness import download

download.WAITS = (0, 0, 0)
download.download(*sys.argv[1:])
"""


def start(server, folder):
    """Start a process that downloads the file to a folder."""
    command = [sys.executable, "-c", DOWNLOAD, f"{server.url}/adroit/{NAME}", folder / NAME]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("first", ["whole", "cut", "404", "short"])
def test_of_several_downloads_at_once_one_asks_for_the_file(server, content, tmp_path, first):
    """If that fails, the next one asks."""
    server.plan = [first, "whole"]
    lock = open(tmp_path / f"{NAME}.part.lock", "a")
    fcntl.flock(lock, fcntl.LOCK_EX)
    processes = [start(server, tmp_path) for _ in range(3)]
    for process in processes:
        assert b"waiting for another process" in process.stdout.readline()
    lock.close()
    codes = sorted(process.wait() for process in processes)
    for process in processes:
        process.communicate()
    assert codes == [0, 0, int(first in ("404", "short"))]
    assert len(server.asked) == (1 if first == "whole" else 2)
    assert os.listdir(tmp_path) == [NAME]
    assert (tmp_path / NAME).read_bytes() == content


def test_a_process_that_is_killed_leaves_no_lock(server, get, content, tmp_path):
    server.plan = ["stall", "whole"]
    process = start(server, tmp_path / "cache")
    while not server.asked:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert get() == content


# --- The dataset of a run ---


@pytest.fixture
def cache(server, monkeypatch, tmp_path):
    """An empty folder in place of D4RL's cache, for a dataset on the server."""
    monkeypatch.setattr(d4rl.offline_env, "DATASET_PATH", str(tmp_path))
    arguments = gym.spec(rebrac.Config().dataset_name).kwargs
    monkeypatch.setitem(arguments, "dataset_url", f"{server.url}/{NAME}")
    return tmp_path


def test_a_dataset_is_downloaded_once(server, cache, content):
    for _ in range(2):
        path = dataset_file(rebrac.Config())
    assert path == str(cache / NAME)
    assert (cache / NAME).read_bytes() == content
    assert len(server.asked) == 1


def test_a_file_put_by_hand_is_neither_downloaded_nor_checked(cache, monkeypatch):
    monkeypatch.setattr(datasets, "download", None)
    (cache / NAME).write_bytes(b"")
    assert dataset_file(rebrac.Config()) == str(cache / NAME)
    assert dataset_file(rebrac.Config(dataset_path=BUNDLED)) == BUNDLED


def test_a_dataset_that_is_a_folder_gets_one_line(cache):
    (cache / NAME).mkdir()
    fails(f"{NAME} is a folder", dataset_file, rebrac.Config())
    fails("data is a folder", dataset_file, rebrac.Config(dataset_path="data"))


def test_a_task_without_a_file_of_d4rls_gets_one_line(monkeypatch):
    arguments = gym.spec(rebrac.Config().dataset_name).kwargs
    monkeypatch.delitem(arguments, "dataset_url")
    fails("use --dataset_path", dataset_file, rebrac.Config())


def test_a_sweep_only_downloads_its_datasets(server, content, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(d4rl.offline_env, "DATASET_PATH", str(tmp_path / "cache"))
    monkeypatch.setenv("D4RL_DATASET_URL", server.url)
    grid = "method: grid\nprogram: iql.py\nparameters: {seed: {values: [0, 1]}}\n"
    (tmp_path / "sweep.yaml").write_text(grid)
    flags = ["--dataset_name", "halfcheetah-medium-replay-v2"]
    monkeypatch.setattr(sys, "argv", ["sweep", "sweep.yaml", "--download", *flags])
    sweep.main()
    path = tmp_path / "cache" / NAME
    assert path.read_bytes() == content
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    assert server.asked == [(f"/{NAME}", 0)]
    assert not (tmp_path / "results").exists()
