"""A run's tables: CSV files that grow by rows and can be cut to what they were."""

import contextlib
import csv
import itertools
import operator
import os

from harness.errors import UserError
from harness.evaluation import evaluation_episodes

TABLES = ("train.csv", "evaluations.csv", "episodes.csv")


class Tables:
    """The tables in a run's directory."""

    def __init__(self, directory):
        self.directory = directory
        self.files = {}

    def path(self, name):
        return os.path.join(self.directory, name)

    def create(self):
        """Create those that aren't there, empty."""
        for name in TABLES:
            with open(self.path(name), "ab"):
                pass

    def append(self, name, rows):
        """Append rows, which are dictionaries with the same keys."""
        if name not in self.files:
            self.files[name] = open(self.path(name), "a+", newline="")
            if self.files[name].tell() > 0:
                self.check_header(self.files[name], list(rows[0]))
        file = self.files[name]
        writer = csv.DictWriter(file, rows[0])
        if file.tell() == 0:
            writer.writeheader()
        for row in rows:
            writer.writerow({key: as_text(value) for key, value in row.items()})

    def check_header(self, file, columns):
        """Raise UserError if a table has rows with other columns, of another version."""
        file.seek(0)
        header = next(csv.reader([file.readline()]))
        file.seek(0, os.SEEK_END)
        if header != columns:
            raise UserError(
                f"{file.name} has other columns, of another version of the script; resume with "
                f"that version, or remove {self.directory} to start anew"
            )

    def read(self, name):
        """Yield the rows with their values as numbers."""
        if not os.path.exists(self.path(name)):
            return
        with open(self.path(name), newline="") as file:
            for row in csv.DictReader(file):
                numbers = {key: float(text) for key, text in row.items()}
                numbers["seed"] = int(row["seed"])
                numbers["update"] = int(row["update"])
                yield numbers

    def updates(self):
        """Yield what is logged of each update, in order: the rows of all seeds in one table."""
        by_update = operator.itemgetter("update")
        rows = [*self.read("train.csv"), *self.read("evaluations.csv")]
        rows.sort(key=by_update)  # a stable sort: an update's losses stay before its evaluation
        for _, group in itertools.groupby(rows, key=lambda row: (row["update"], "score" in row)):
            yield list(group)

    def save(self):
        """Bring all rows to the disk and return the tables' sizes."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        return {name: os.path.getsize(self.path(name)) for name in TABLES}

    def cut(self, sizes):
        """Cut the tables to the sizes that `save` has returned."""
        self.close()  # else rows that are still to be written would come after the cut
        for name, size in sizes.items():
            if os.path.getsize(self.path(name)) < size:
                raise UserError(
                    f"{self.path(name)} has lost rows; remove {self.directory} to start anew"
                )
            os.truncate(self.path(name), size)

    def close(self):
        """Close the files.

        On a full disk rows after the last checkpoint may be lost. Resuming writes them again.
        """
        for file in self.files.values():
            with contextlib.suppress(OSError):
                file.close()
        self.files.clear()

    def are_empty(self):
        return not any(os.path.getsize(self.path(name)) for name in TABLES)


def as_text(value):
    return f"{value:.9g}" if isinstance(value, float) else value


# --- Rows ---


def seed_rows(config, update, values):
    """Return a row for each seed of values (seeds,) by their names."""
    rows = []
    for i in range(config.num_seeds):
        own = {key: float(value[i]) for key, value in values.items()}
        rows.append(dict(seed=config.seed + i, update=update, **own))
    return rows


def episode_rows(config, update, returns, scores):
    """Return a row for each episode of an evaluation: returns and scores (seeds, E)."""
    rows = []
    for i in range(config.num_seeds):
        for j, (episode, action_noise, state_noise) in enumerate(evaluation_episodes(config)):
            row = dict(seed=config.seed + i, update=update, episode=episode)
            row["action_noise"] = action_noise
            row["state_noise"] = state_noise
            row["return"] = float(returns[i, j])
            row["score"] = float(scores[i, j])
            rows.append(row)
    return rows
