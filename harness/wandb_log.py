"""Weights & Biases gets what a run's tables hold. Training never asks for it and never needs it."""

import contextlib
import netrc
import os
import urllib.parse

import numpy as np

from harness.errors import one_line

TIME_LIMIT = 30  # seconds to reach W&B, and to send the rest at the end


def wandb_mode():
    """Return W&B's mode, and why.

    WANDB_MODE decides. Without it, W&B is online with an account or under a sweep's agent.
    """
    if mode := os.getenv("WANDB_MODE"):
        old_names = {"dryrun": "offline", "run": "online"}
        return old_names.get(mode, mode), f"WANDB_MODE={mode}"
    if os.getenv("WANDB_SWEEP_ID"):
        return "online", "a run of a sweep"
    host = urllib.parse.urlparse(os.getenv("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        if netrc.netrc(os.getenv("NETRC")).authenticators(host):
            return "online", f"an account at {host}"
    if os.getenv("WANDB_API_KEY"):
        return "online", f"an account at {host}"
    return "disabled", "no account; WANDB_MODE=offline keeps what `wandb sync` can send later"


class WandB:
    """A W&B run for a run's directory. A resumed run continues in the same W&B run.

    wandb sends from a process of its own, so that only the start and the end wait for it, and
    not for longer than TIME_LIMIT each.
    """

    def __init__(self, directory, algorithm, fields):
        self.mode, why = wandb_mode()
        print(f"W&B: {'off' if self.mode == 'disabled' else self.mode} ({why})")
        self.run = None
        self.first_step = 0  # that W&B doesn't have from before
        self.step = 0
        self.values = {}  # of this step, not sent yet: its losses and its evaluation come apart
        self.later = f"later, `wandb sync {directory}/wandb/*run*` sends it"
        if self.mode == "disabled":
            return
        self.settings = dict(
            id=os.getenv("WANDB_RUN_ID") or own_id(directory),  # a sweep's agent gives one
            dir=directory,
            name=os.path.basename(directory),
            resume="allow",
            config=dict(algorithm=algorithm, **fields),
            group=f"{algorithm}-{fields['dataset_name']}",
        )
        if not os.getenv("WANDB_SWEEP_ID"):
            self.settings["project"] = os.getenv("WANDB_PROJECT", "regularised-actors")

    def start(self, updates):
        """Begin, and send the rows of `updates` that W&B doesn't have from before."""
        if self.mode == "disabled":
            return
        with self.never_fatal():
            self.run = self.begin()
            self.first_step = self.run.step
        for rows in updates:
            self.send(rows)

    def begin(self):
        """Return a W&B run, offline if W&B can't be reached in time."""
        import wandb

        try:
            return self.init(self.mode)
        except Exception as error:
            print(f"W&B: offline after all ({one_line(error)[:200]}); {self.later}")
            wandb.teardown()  # or the next init would fail, too
            return self.init("offline")

    def init(self, mode):
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
        )
        wandb.setup(settings)  # since a silent wandb doesn't ask for a login on a terminal
        return wandb.init(mode=mode, settings=settings, **self.settings)

    @contextlib.contextmanager
    def never_fatal(self):
        """Turn W&B off where it fails."""
        try:
            yield
        except Exception as error:
            print(f"W&B: off after all ({one_line(error)[:200]})")
            self.run = None

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

    def close(self, exit_code, preempted):
        """End the W&B run. One that was preempted is given to another agent by its sweep."""
        if self.run is None:
            return
        with self.never_fatal():
            if exit_code == 0:  # otherwise the resumed run sends the last step, whole
                self.flush()
            if preempted:
                self.run.mark_preempting()
            try:
                self.run.finish(exit_code=exit_code)
            except TimeoutError:
                print(f"W&B has not taken everything in {TIME_LIMIT} s; {self.later}")


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
