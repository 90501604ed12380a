"""Weights & Biases gets what a run's tables hold. Training never asks for it and never needs it."""

import contextlib
import glob
import os
import shlex
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from harness.errors import one_line

TIME_LIMIT = 30  # seconds to reach W&B, and to send the rest at the end
ANSWER_LIMIT = 5  # seconds for the answer to a question
PAUSE = 600  # seconds after a start in vain, in which other runs of this process don't wait


def wandb_mode():
    """Return W&B's mode, and why.

    wandb's own settings decide: WANDB_MODE, or what `wandb offline` has set. Otherwise W&B is
    online with an account or under a sweep's agent.
    """
    settings = own_settings()
    old_names = {"dryrun": "offline", "run": "online"}
    mode = old_names.get(settings.mode, settings.mode)
    if word := os.getenv("WANDB_MODE"):
        return mode, f"WANDB_MODE={word}"
    if mode in ("offline", "disabled"):
        return mode, f"as `wandb {mode}` has set it"
    if os.getenv("WANDB_SWEEP_ID"):
        return mode, "a run of a sweep"
    if has_account(settings):
        return mode, f"an account at {urllib.parse.urlsplit(settings.base_url).netloc}"
    return "disabled", "no account; WANDB_MODE=offline keeps what `wandb sync` can send later"


def own_settings():
    """Return wandb's settings, as wandb.init will find them in its files and the environment.

    Unlike wandb.setup, this starts no process, and heeds later changes of the environment.
    """
    import wandb

    settings = wandb.Settings(silent=True)
    folder = os.path.expanduser(os.getenv("WANDB_CONFIG_DIR", "~/.config/wandb"))
    settings.settings_system = os.path.join(folder, "settings")
    settings.update_from_system_settings()
    settings.update_from_env_vars(os.environ)
    return settings


def has_account(settings):
    """Return whether there is a login for the server, be it a valid one or not."""
    from wandb.errors import AuthenticationError
    from wandb.sdk.lib import wbauth

    if settings.api_key or settings.identity_token_file:
        return True
    try:
        return wbauth.read_netrc_auth(host=settings.base_url) is not None
    except AuthenticationError:
        return True


class WandB:
    """A W&B run for a run's directory. A resumed run continues in the same W&B run.

    wandb sends from a process of its own, so that only the start and the end wait for it, each for
    about TIME_LIMIT at most. Many runs of one process wait no longer: after one that has started
    in vain the others begin offline, and all end at the same time.
    """

    waited_at = -np.inf  # when a run of this process has waited for W&B in vain
    live = set()  # of this process: those whose W&B runs have begun and not ended

    def __init__(self, directory, algorithm, fields):
        try:
            self.mode, why = wandb_mode()
        except Exception as error:
            self.mode, why = "disabled", one_line(error)[:200]
        self.later = f"later, `wandb sync {shlex.quote(os.path.join(directory, 'wandb'))}` sends it"
        line = f"W&B: {'off' if self.mode == 'disabled' else self.mode} ({why})"
        print(f"{line}; {self.later}" if self.mode == "offline" else line)
        self.directory = directory
        self.run = None
        self.is_beginning = False
        self.ending = None  # the future of its end, once that has begun
        self.first_step = 0  # the first one that W&B lacks
        self.step = 0
        self.sent = 0  # the last step that was sent whole
        self.values = {}  # of this step, not sent yet: its losses and its evaluation come apart
        if self.mode == "disabled":
            return
        self.id = os.getenv("WANDB_RUN_ID") or own_id(directory)  # a sweep's agent gives one
        self.settings = dict(
            id=self.id,
            dir=directory,
            name=os.path.basename(directory),
            resume="allow",
            config=dict(algorithm=algorithm, **fields),
            group=f"{algorithm}-{fields['dataset_name']}",
        )
        if not os.getenv("WANDB_SWEEP_ID"):
            self.settings["project"] = own_settings().project or "regularised-actors"

    def start(self, updates):
        """Begin, and send the rows of `updates` that W&B doesn't have from before."""
        if self.mode == "disabled" or self.run is not None:
            return
        with self.never_fatal():
            self.is_beginning = True
            self.run = self.begin()
            WandB.live.add(self)
            if self.mode == "offline":
                self.first_step = sent_step(self.directory, self.id) + 1
            else:
                self.first_step = self.run.step
            self.sent = self.first_step - 1
        self.is_beginning = False  # unless a signal has ended the process before
        for rows in updates:
            self.send(rows)

    def is_busy(self):
        """Return whether it is at its start, which a signal may have cut short, or at its end."""
        return self.is_beginning or (self.ending is not None and not self.ending.done())

    def begin(self):
        """Return a W&B run, offline if W&B can't be reached in time."""
        import wandb

        started = time.monotonic()
        try:
            if self.mode != "offline" and started - WandB.waited_at < PAUSE:
                raise TimeoutError("another run has just waited for W&B in vain")
            return self.init()
        except Exception as error:
            print(f"W&B: offline after all ({one_line(error)[:200]}); {self.later}")
            if time.monotonic() - started >= TIME_LIMIT:
                WandB.waited_at = time.monotonic()
            # A failed start may still hold the id. This frees it, but would also end live runs.
            if not WandB.live:
                wandb.teardown()
            self.mode = "offline"
            return self.init()

    def init(self):
        """Call wandb.init with the time limits, and so that it never waits for an answer."""
        import wandb

        # Otherwise wandb reports its own errors to the server, and 20 s may pass before it exits
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        settings = wandb.Settings(
            init_timeout=TIME_LIMIT,
            finish_timeout=TIME_LIMIT,
            finish_timeout_raises=True,
            console="off",
            silent=True,
            reinit="create_new",  # beside those of other runs that are trained together
        )
        if os.getenv("WANDB_SWEEP_ID"):
            # The agent sends SIGTERM to a run that is stopped in W&B's pages. wandb's own SIGINT
            # would be a second signal, which ends a run at once.
            settings.stop_fn = lambda: None
        wandb.setup(settings)  # since a silent wandb doesn't ask for a login on a terminal
        return wandb.init(mode=self.mode, settings=settings, **self.settings)

    @contextlib.contextmanager
    def never_fatal(self):
        """Turn W&B off where it fails."""
        try:
            yield
        except Exception as error:
            print(f"W&B: off after all ({one_line(error)[:200]})")
            self.run = None
            WandB.live.discard(self)

    def send(self, rows):
        """Send an update's rows of one table, a row for each seed."""
        if self.run is None or rows[0]["update"] < self.first_step:  # W&B has it from before
            return
        with self.never_fatal():
            if rows[0]["update"] > self.step:
                self.flush()
            self.step = rows[0]["update"]
            keys = [key for key in rows[0] if key not in ("seed", "update")]
            for key in keys:
                self.values[key] = np.mean([row[key] for row in rows])
                if len(rows) > 1:
                    for row in rows:
                        self.values[f"seed{row['seed']}/{key}"] = row[key]

    def flush(self):
        """Send what was kept back of the last step, which can't be added to afterwards."""
        if self.values:
            self.run.log(self.values, step=self.step)
            self.values = {}
            self.sent = self.step
            if self.mode == "offline":
                self.remember()

    def send_last(self):
        """Send the last step, to which nothing will be added."""
        if self.run is not None:
            with self.never_fatal():
                self.flush()

    def remember(self):
        """Write down the last step sent, so that a later offline run leaves out what W&B has."""
        with open(os.path.join(self.directory, "wandb_sent"), "w") as file:
            file.write(f"{self.id} {self.sent}\n")

    def mark_as_synced(self):
        """Let `wandb sync` leave out earlier offline runs, since W&B has their rows by now."""
        folder = os.path.join(glob.escape(self.directory), "wandb")
        for path in glob.glob(f"{folder}/offline-run-*-{self.id}/*.wandb"):
            open(f"{path}.synced", "w").close()

    def start_finish(self, exit_code, preempted):
        """Begin to end the W&B run, in a thread. `wait` waits for that."""
        if self.run is not None:
            self.ending = ThreadPoolExecutor(1).submit(self.finish, exit_code, preempted)

    def finish(self, exit_code, preempted):
        """End the W&B run. One that was preempted is given to another agent by its sweep."""
        if exit_code == 0:  # otherwise the resumed run sends the last step, whole
            self.flush()
        if preempted and self.mode != "offline" and not self.was_stopped_there():
            self.run.mark_preempting()
        self.run.finish(exit_code=exit_code)
        self.remember()
        if self.mode != "offline":
            self.mark_as_synced()

    def wait(self):
        """Wait until the W&B run has ended."""
        if self.ending is None:
            return
        with self.never_fatal():
            try:
                self.ending.result()
            except TimeoutError:
                print(f"W&B has not taken everything in {TIME_LIMIT} s; {self.rest()}")
        WandB.live.discard(self)

    def was_stopped_there(self):
        """Return whether somebody has stopped the run in W&B's pages, if W&B says so in time.

        An agent sends SIGTERM for that, too.
        """
        from wandb.sdk.launch.api import LaunchApi

        try:
            api = LaunchApi(timeout=ANSWER_LIMIT)
            return api.check_stop_requested(self.run.project, self.run.entity, self.run.id)
        except Exception:
            return False

    def rest(self):
        """Say how W&B gets the rest. It may have a part, which `wandb sync` would send again."""
        if self.mode == "offline":
            return self.later
        if os.getenv("WANDB_SWEEP_ID"):
            return f"the rest is in {self.directory}"
        return "the same command sends the rest"


def own_id(directory):
    """Return the id of a directory's W&B run. It is made the first time and kept in a file."""
    path = os.path.join(directory, "wandb_id")
    with open(path, "a+") as file:
        file.seek(0)
        known = file.read()
        if known:
            return known
        new = os.urandom(4).hex()
        file.write(new)
        return new


def sent_step(directory, run_id):
    """Return the last step that a W&B run has, or an offline run's files; -1 if there is none."""
    with contextlib.suppress(OSError, ValueError):
        with open(os.path.join(directory, "wandb_sent")) as file:
            known, step = file.read().split()
        if known == run_id:
            return int(step)
    return -1


def is_whole_there(directory, update):
    """Return whether W&B has a run's rows up to an update, if it was meant to get any."""
    if not os.access(os.path.join(directory, "wandb_id"), os.W_OK):
        return True  # it wasn't meant to, or it is another user's run
    return sent_step(directory, own_id(directory)) >= update
