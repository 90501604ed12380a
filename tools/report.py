"""Turns runs' directories, or a W&B project, into the paper's tables and figures, with rliable.

    python -m tools.report                        # the runs in results/, or else the study
    python -m tools.report --results '[results, elsewhere]' --final mean
    python -m tools.report --wandb team/project
    python -m tools.report --results '[results]' --csv results.csv  # and a table, to be read again

Into `output` go tables.md, tables.tex, each figure as .png and .pdf, and index.html, one page with
all of it. Runs are compared with those of the same settings: whatever differs from the defaults
for the dataset, beside seeds and regularisers, makes sections. Of several seeds trained in one
run each counts as a run.
"""

import base64
import glob
import os
import re
import signal
from dataclasses import dataclass, field
from typing import List, Optional

if __name__ == "__main__":  # Ctrl-C shows no traceback in the imports, which take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from markdown_it import MarkdownIt

from harness.config import parse
from harness.datasets import DOMAINS, is_other_file
from harness.errors import UserError, disk_errors, make_folder, one_line, one_line_errors
from harness.scripts import scripts
from tools import report_effects as effects
from tools import report_figures as figures
from tools import report_shares as shares
from tools import report_tables as tables
from tools.report_runs import (
    BASELINE,
    by_label,
    by_settings,
    content,
    read_results,
    read_wandb,
)
from tools.results import mean_of_last, write_results


def default_results():
    return ["results" if glob.glob("results/*/*/*") else "data/study.csv"]


MOST_DRAWN = 24  # labels in a figure of points or bars


@dataclass(frozen=True)
class Config:
    results: List[str] = field(default_factory=default_results)  # folders of runs, or tables (.csv)
    wandb: Optional[str] = None  # team/project, read instead of directories
    output: str = "report"  # directory
    csv: Optional[str] = None  # file into which all results go as a table, too
    final: str = "last"  # a run's score: the last evaluation's, or mean: of the last 10 (AntMaze 5)
    reps: int = 2000  # bootstrap resamples
    variants: int = 8  # in a figure of lines, at most
    beside: Optional[str] = None  # table of other people's scores to show, too: data/corl.csv


CSS = """<style>
body {font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em}
table {border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto}
td, th {padding: 3px 9px; text-align: right; border-bottom: 1px solid #ddd}
td:first-child, th:first-child {text-align: left; white-space: nowrap}
h2 {border-top: 1px solid #ccc; padding-top: 1em}
img {max-width: 100%}
</style>"""


class Report:
    """Collects Markdown, tables and figures, and writes them into a directory."""

    def __init__(self, directory):
        self.directory = directory
        self.markdown = []
        self.latex = ["% needs booktabs and graphicx\n"]
        self.sections = 0
        self.figures = set()  # names of their files
        make_folder(directory)

    def path(self, name):
        return os.path.join(self.directory, name)

    def add_text(self, text):
        self.markdown.append(text)

    def begin_section(self, title):
        self.sections += 1
        self.markdown.append(f"## {title}\n")
        self.latex.append(f"% {title}\n")

    def add_table(self, table):
        self.markdown.append(tables.to_markdown(table))
        self.latex.append(tables.to_latex(table))

    def add_figure(self, title, figure, caption):
        """Add a figure and its caption, and write its files. None is nothing to show."""
        if figure is None:
            return
        name = re.sub(r"[^a-z0-9]+", "-", f"{self.sections}-{title}".lower())
        while name in self.figures:  # of an algorithm such as IQL+ beside IQL
            name += "-again"
        self.figures.add(name)
        for suffix in ("png", "pdf"):
            with disk_errors(self.directory):
                figure.savefig(self.path(f"{name}.{suffix}"), dpi=130, bbox_inches="tight")
        plt.close(figure)
        self.markdown.append(f"![{title}]({name}.png)\n\n{title}. {caption}\n")

    def write(self):
        """Write tables.md, tables.tex and index.html, which is tables.md as one page."""
        markdown = "\n".join(self.markdown) + "\n"
        page = MarkdownIt("js-default").render(markdown)
        page = re.sub(r'src="(.*?)"', self.embed, page)
        head = "<!doctype html><html lang=en><meta charset=utf-8><title>Report</title>"
        texts = {
            "tables.md": markdown,
            "tables.tex": "\n".join(self.latex) + "\n",
            "index.html": f"{head}{CSS}{page}</html>\n",
        }
        for name, text in texts.items():
            with disk_errors(self.directory):
                with open(self.path(name), "w", encoding="utf-8", errors="replace") as file:
                    file.write(text)
        print(f"wrote {self.path('index.html')}, tables.md, tables.tex and the figures")

    def embed(self, match):
        """Return an image's `src="name.png"` with the image itself."""
        with open(self.path(match[1]), "rb") as file:
            data = base64.b64encode(file.read()).decode()
        return f'src="data:image/png;base64,{data}"'


# --- What is in it ---

ALL = "all domains"


def final_score(seed, final):
    """Return a finished seed's score: its last evaluation's, or the mean of the last 10 or 5."""
    if seed["state"] != "finished":
        return np.nan
    if final == "last":
        return seed["scores"][-1]
    return seed.get("mean_score", mean_of_last(seed["scores"], seed["domain"]))


def all_datasets(rows):
    """Return the datasets, in the order of their domains."""
    found = datasets_by_domain(rows)
    found.pop(ALL, None)
    return sum(found.values(), [])


def datasets_by_domain(rows):
    """Return the datasets of each domain by its title, and last of all domains if several."""
    found = {}
    for domain, title in DOMAINS.items():
        names = rows.loc[rows["domain"] == domain, "dataset"].unique()
        if len(names):
            found[title] = sorted(names)
    if len(found) > 1:
        found[ALL] = sum(found.values(), [])
    return found


def add_settings(report, config, seeds):
    """Add the tables and figures of the seeds with the same settings."""
    improvements = {}
    curves = {}
    for algorithm, script in scripts().items():
        own = seeds[seeds["algorithm"] == algorithm]
        if own.empty:
            continue
        rows = by_label(own)
        domains = datasets_by_domain(rows)
        for domain, datasets in domains.items():
            title = f"{script.NAME}, {domain}"
            add_scores(report, title, rows, datasets, domain == ALL)
            arrays = tables.score_arrays(rows, datasets)
            if not arrays:
                continue
            complete = rows[rows["label"].isin(arrays)]
            drawn, which = drawn_labels(complete, datasets, script, config.variants)
            add_aggregates(report, config, title, arrays, drawn, which)
            panel = title if len(datasets) > 1 else f"{script.NAME}, {datasets[0]}"
            gains = tables.improvements(rows, datasets)
            if len(gains):
                improvements[panel] = gains
            if len(arrays) > 1:  # as if each dataset were tuned on its own
                means = 100 * np.stack([scores.mean(0) for scores in arrays.values()])
                expected = [tables.expected_online_performance(column) for column in means.T]
                curves[panel] = np.mean(expected, axis=0)
        finished = rows[rows["final"].notna()].dropna(axis="columns", how="all")
        if len(finished):
            add_runs(report, config, script, finished, all_datasets(rows))
    if improvements:
        caption = (
            "Differences seed by seed, in percent of the baseline's mean. 95 % intervals of each "
            "alone, by Student's t."
        )
        figure = figures.improvement_figure(improvements)
        report.add_figure("improvement over the baseline", figure, caption)
    if curves:
        caption = (
            "Expected best score of n configurations, drawn with replacement. A run with two names "
            "counts under each."
        )
        figure = figures.online_performance(curves)
        report.add_figure("expected online performance", figure, caption)


def add_scores(report, title, rows, datasets, of_all):
    """Add the tables of scores and of differences from the baseline."""
    columns = {"mean": datasets} if len(datasets) > 1 else {}
    if not of_all:
        report.add_table(tables.score_table(f"{title}: scores", rows, datasets))
        columns = {dataset: [dataset] for dataset in datasets} | columns
    labels = set(rows["label"])
    num_seeds = rows.loc[rows["final"].notna(), "seed"].nunique()  # one has no intervals
    if BASELINE in labels and len(labels) > 1 and num_seeds > 1:
        report.add_table(tables.difference_table(f"{title}: differences", rows, columns))


def drawn_labels(rows, datasets, script, number):
    """Return the labels to draw in a figure, at most `number`, and a sentence for its caption.

    The baseline and the paper's combination come first. Then come those whose mean score differs
    most from the baseline's.
    """
    labels = list(rows["label"].sort_values().unique())
    if len(labels) <= number:
        return labels, ""
    sentence = f" Drawn are {number} of {len(labels)}:"
    if BASELINE not in labels:
        return labels[:number], f"{sentence} the first."
    gains = figures.gains_over_baseline(rows, datasets).mean(axis=1, skipna=False).abs().fillna(0)
    first = [label for label in (BASELINE, "best", script.BEST.get("best")) if label in labels]
    others = sorted(set(labels) - set(first), key=lambda label: (-gains[label], label))
    chosen = [*first, *others][:number]
    sentence += f" {', '.join(first[:number])}"
    if number > len(first):
        sentence += ", and those whose mean score differs most from the baseline's"
    return [label for label in labels if label in chosen], f"{sentence}."


def add_aggregates(report, config, title, arrays, drawn, which):
    """Add rliable's table and figures of scores / 100, with performance profiles of some labels."""
    estimates = tables.estimate(arrays, config.reps)
    report.add_table(tables.aggregate_table(f"{title}: aggregates", estimates, arrays))
    figure = figures.interval_figure(estimates)
    caption = "The intervals are by rliable's stratified bootstrap."
    report.add_figure(f"{title}: aggregates with 95 % intervals", figure, caption)
    figure = figures.performance_profiles({label: arrays[label] for label in drawn}, config.reps)
    caption = "Bands are of 95 %, by rliable's stratified bootstrap." + which
    report.add_figure(f"{title}: performance profiles", figure, caption)


def add_runs(report, config, script, rows, datasets):
    """Add what else is known of an algorithm's finished runs, on all its datasets."""
    title = script.NAME
    drawn, which = drawn_labels(rows, datasets, script, config.variants)
    curves = figures.learning_curves(rows, drawn, datasets)
    caption = "Means over the seeds; bands are one standard deviation." + which
    report.add_figure(f"{title}: learning curves", curves, caption)
    caption = "Mean score less the baseline's. In brackets a strength other than in CHOSEN."
    singles = figures.single_map(rows, datasets, script.CHOSEN)
    report.add_figure(f"{title}: gains of single regularisers", singles, caption)
    caption = "Mean score over the datasets less the baseline's. The diagonal is one alone."
    pairs = figures.pair_map(rows, datasets, script.CHOSEN)
    report.add_figure(f"{title}: pairs of regularisers", pairs, caption)
    add_interactions(report, config, script, rows)
    inside = tables.inside_table(f"{title}: inside the actor", rows, datasets)
    if inside.cells.size:
        report.add_table(inside)
    add_explanation(report, config, script, rows)
    drawn, which = drawn_labels(rows, datasets, script, MOST_DRAWN)
    rows = rows[rows["label"].isin(drawn)]
    caption = "Points are seeds, lines their means." + which
    report.add_figure(f"{title}: inside the actor", figures.inside_figure(rows, datasets), caption)
    caption = "Means over the datasets, with 95 % intervals over the seeds, by Student's t." + which
    report.add_figure(f"{title}: robustness", figures.robustness_figure(rows, datasets), caption)


def add_interactions(report, config, script, rows):
    """Add what pairs and triples gain beyond their parts, where there are pairs."""
    found = effects.interactions(rows, script.CHOSEN, config.reps)
    missing = effects.unestimated(rows, script.CHOSEN, found)
    title = f"{script.NAME}: interactions"
    if len(found):
        report.add_table(effects.interaction_table(title, found, missing))
        caption = "A pair's gain less the sum of both single gains."
        report.add_figure(title, figures.interaction_map(found, script.CHOSEN), caption)
    elif any(label.count("+") == 1 for label in missing):
        report.add_text(f"### {title}\n\n{effects.missing_text(missing)}\n")


def add_explanation(report, config, script, rows):
    """Add which measures of the inside explain the score, if there are enough runs."""
    found = effects.explain(rows, script.CHOSEN, config.reps)
    if found is not None:
        title = f"{script.NAME}: what explains the score"
        report.add_table(effects.explanation_table(title, found))
        caption = f"95 % intervals by a bootstrap of blocks. *: p below {tables.LEVEL}, corrected."
        report.add_figure(title, figures.explanation_figure(found), caption)


def add_less_data(report, config, seeds):
    """Add what regularisers gain where fewer episodes are trained on, if some runs had fewer."""
    for algorithm, script in scripts().items():
        own = seeds[seeds["algorithm"] == algorithm]
        for settings, rows in shares.groups(own):
            report.begin_section(f"{script.NAME}, less data. {settings_text(settings)}")
            datasets = all_datasets(rows)
            title = f"{script.NAME}: gain by share of the data"
            report.add_table(shares.share_table(title, rows, datasets))
            drawn, which = drawn_labels(rows, datasets, script, config.variants)
            figure = shares.share_figure(rows[rows["label"].isin(drawn)], datasets)
            caption = "Means over the seeds; bands are 95 % intervals, by Student's t."
            report.add_figure(title, figure, caption + which)


def settings_text(settings):
    words = [f"{key}={value}" for key, value in settings] or ["the defaults"]
    return f"Settings: {', '.join(words)}"


def without_failed_datasets(seeds):
    """Return the seeds without those of datasets on which all runs failed, as of a wrong file."""
    alive = {seed["dataset"] for seed in seeds if seed["state"] != "failed"}
    return [seed for seed in seeds if seed["dataset"] in alive]


def read_published(path):
    """Return a table of other people's scores."""
    columns = {"source", "algorithm", "dataset_name", "mean", "std"}
    try:
        published = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"beside: can't read {path} ({one_line(error)})") from error
    if not columns <= set(published):
        raise UserError(f"beside: {path} needs the columns {', '.join(sorted(columns))}")
    scores = published[["mean", "std"]]
    if not all(pd.api.types.is_numeric_dtype(scores[name]) for name in scores):
        raise UserError(f"beside: in {path} a mean or a std is no number")
    if published["mean"].isna().any():
        raise UserError(f"beside: in {path} a mean is missing")
    if published.duplicated(["source", "algorithm", "dataset_name"]).any():
        raise UserError(f"beside: {path} has two scores of one algorithm on one dataset")
    return published


def add_published(report, published, seeds):
    """Add other people's scores on the datasets that are in the report."""
    report.begin_section("Other people's scores")
    used = {seed["config"]["dataset_name"] for seed in seeds}
    for domain, title in DOMAINS.items():
        names = {seed["config"]["dataset_name"] for seed in seeds if seed["domain"] == domain}
        names &= set(published["dataset_name"])
        if names:
            own = published[published["dataset_name"].isin(names)]
            report.add_table(tables.published_table(title, own, sorted(names)))
    if not used & set(published["dataset_name"]):
        report.add_text("None are known for these datasets.\n")


def main(config):
    if config.final not in ("last", "mean"):
        raise UserError("final must be last or mean")
    if min(config.reps, config.variants) < 1:
        raise UserError("reps and variants must be 1 or more")
    scripts()  # an error before any work if two have one name
    published = None if config.beside is None else read_published(config.beside)
    report = Report(config.output)  # an error before any work if it can't be written
    if config.wandb:
        source = config.wandb
        seeds, left_out = read_wandb(config.wandb)
    else:
        source = ", ".join(config.results)
        seeds, left_out = read_results(config.results)
    finished = [seed for seed in seeds if seed["state"] == "finished"]
    summary = f"{source}: {len(finished)} finished seeds; left out: {len(left_out)}"
    print(summary)
    for run, reason in left_out[:20]:
        print(f"  left out: {run}: {reason}")
    if len(left_out) > 20:
        print(f"  and {len(left_out) - 20} more, which the report lists")
    if not finished:
        raise UserError(
            "there is no finished run; name the directories that hold runs with --results '[...]'"
        )

    if config.csv:
        write_results(config.csv, seeds)
    seeds = without_failed_datasets(seeds)
    for seed in seeds:
        seed["final"] = final_score(seed, config.final)
    final = "the last evaluation"
    if config.final == "mean":
        final = "the mean of the last 10 evaluations, on AntMaze 5"
    report.add_text(f"# Report\n\n{summary}. A run's score is that of {final}.\n")
    files = {seed["dataset"]: content(seed) for seed in seeds}
    others = sorted(dataset for dataset, file in files.items() if is_other_file(*file))
    if others:
        report.add_text(f"Not D4RL's own files, by their checksums: {', '.join(others)}.\n")
    for settings, own in by_settings(pd.DataFrame(seeds)):
        report.begin_section(settings_text(settings))
        add_settings(report, config, own)
    add_less_data(report, config, pd.DataFrame(seeds))
    if published is not None:
        add_published(report, published, seeds)
    if left_out:
        lines = [f"- `{run}`: {reason}" for run, reason in left_out]
        report.add_text("\n".join(["## Left out\n", *lines, ""]))
    report.write()


if __name__ == "__main__":
    with one_line_errors():
        main(parse(Config))
