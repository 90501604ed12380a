"""What runs tell together: how regularisers interact, and what explains a gain.

`rows` is a DataFrame with a row for each finished run and label of one algorithm, `chosen` the
script's CHOSEN. A block is the runs of one seed on one dataset. They share their first parameters
and their batches.
"""

import itertools
from typing import NamedTuple

import numpy as np
import pandas as pd

from tools import report_tables as tables
from tools.report_runs import BASELINE

BLOCK = ["dataset", "seed"]

# --- Interactions ---


def combination(label, config, chosen):
    """Return a label's regularisers without strengths: "DO+LN+GrN" of "DO+LN+GrN(0.01)".

    Return None unless each of them has the strength chosen for it alone. In COMBINED some have
    others.
    """
    if label == BASELINE:
        return BASELINE
    names = [word.split("(")[0] for word in label.split("+")]
    for name in names:
        if name not in chosen:
            return None
        if any(config[flag] != value for flag, value in chosen[name].items()):
            return None
    return "+".join(names)


def signs_of_parts(name):
    """Return by label the signs of the scores whose sum is a combination's term.

    A pair's term is DO+LN - DO - LN + baseline: its gain less both gains. A triple's term is its
    gain less the three gains and the three pairs' terms.
    """
    words = name.split("+")
    signs = {}
    for size in range(len(words) + 1):
        for part in itertools.combinations(words, size):
            label = "+".join(part) or BASELINE
            signs[label] = (-1) ** (len(words) - size)
    return signs


def contrasts(rows, chosen):
    """Return terms and gains over the baseline: a row for each pair and triple.

    A column is a block. It has a value where all parts are there and are different runs. (Where
    the baseline has dropout, DO+LN is LN's run.) A combination without two such blocks has no row.
    """
    pairs = zip(rows["label"], rows["config"])
    names = [combination(label, config, chosen) for label, config in pairs]
    rows = rows.assign(name=names, run=rows.index).dropna(subset="name")
    scores = rows.pivot(index=BLOCK, columns="name", values="final")
    runs = rows.pivot(index=BLOCK, columns="name", values="run")
    terms = {}
    gains = {}
    for name in rows["name"].unique():
        signs = signs_of_parts(name)
        if name.count("+") not in (1, 2) or not set(signs) <= set(scores):
            continue
        own = scores[list(signs)].dropna()
        number_of_runs = runs.loc[own.index, list(signs)].nunique(axis=1)
        own = own[number_of_runs == len(signs)]
        if len(own) > 1:
            terms[name] = (own * signs).sum(axis=1).round(9)  # no p value of what is only rounding
            gains[name] = own[name] - own[BASELINE]
    return pd.DataFrame(terms).T, pd.DataFrame(gains).T


def interactions(rows, chosen, reps):
    """Return a row for each pair and triple with two blocks: point, low, high, p, blocks, gain.

    `point` is its term, and `gain` its gain over the baseline in the same blocks.
    """
    terms, gains = contrasts(rows, chosen)
    if terms.empty:
        return pd.DataFrame()
    found = pd.DataFrame({"point": terms.mean(axis=1), "gain": gains.mean(axis=1)})
    found["blocks"] = terms.count(axis=1)
    found["p"] = tables.holm(tables.p_values(terms))
    rng = np.random.default_rng(0)
    for name, values in terms.iterrows():
        values = values.dropna().to_numpy()
        means = rng.choice(values, (reps, len(values))).mean(1)
        found.loc[name, ["low", "high"]] = np.percentile(means, [2.5, 97.5])
    return found


def unestimated(rows, chosen, found):
    """Return the pairs and triples that are in the rows, but not among what was found."""
    names = []
    for label in rows["label"].cat.categories:
        words = label.split("+")
        is_combination = len(words) in (2, 3) and set(words) <= set(chosen)
        if is_combination and label not in found.index:
            names.append(label)
    return names


def interaction_table(title, found, missing):
    """Return the table of interactions. `missing` are those without two blocks."""
    cells = pd.DataFrame(index=found.index)
    cells["sum of the parts"] = (found["gain"] - found["point"]).map("{:+.1f}".format)
    cells["together"] = found["gain"].map("{:+.1f}".format)
    texts = [
        f"{row.point:+.1f} {tables.NO_SPREAD}" if np.isnan(row.p) else row_text(row, "+")
        for row in found.itertuples()
    ]
    cells["interaction"] = [tables.bold(text, p) for text, p in zip(texts, found["p"])]
    cells["p"] = found["p"].map(tables.p_text)
    cells["blocks"] = found["blocks"].map(str)
    note = (
        f"{strongest(found)} All regularisers have the strengths chosen for each alone. A block is "
        "one seed on one dataset. An interaction is the gain together less the sum of the parts: "
        "of the single gains, and for a triple of its pairs' interactions, too. It is a mean over "
        "the blocks that have all parts. Where all blocks do, that is the least-squares fit of a "
        "level for each block and a term for each regulariser, pair and triple. In brackets 95 % "
        "intervals by a bootstrap of blocks, which are too narrow for few blocks. p is Student's "
        f"over the blocks, corrected by Holm over this table. {tables.BOLD}"
        f"{tables.about_spread(cells)}"
    )
    return tables.Table(title, cells, f"{note} {missing_text(missing)}".strip())


def missing_text(missing):
    """Return a sentence of the combinations without two blocks, or nothing."""
    if not missing:
        return ""
    names = ", ".join(missing[:12])
    more = f" and {len(missing) - 12} more" if len(missing) > 12 else ""
    return f"Left out, since no two blocks have all parts at the same strengths: {names}{more}."


def row_text(row, sign):
    """Return a row's point and interval as a text, nothing if the point is NaN."""
    if np.isnan(row.point):
        return ""
    return tables.bounds_text(row.point, row.low, row.high, sign)


def strongest(found):
    """Return a sentence on the strongest synergy and one on the strongest conflict."""
    significant = found[found["p"] < tables.LEVEL]
    synergies = significant[significant["point"] > 0]
    conflicts = significant[significant["point"] < 0]
    return f"{strongest_of(synergies, 'synergy')} {strongest_of(conflicts, 'conflict')}"


def strongest_of(found, word):
    if found.empty:
        return f"No {word} is significant."
    row = found.loc[found["point"].abs().idxmax()]
    p = tables.p_text(row["p"])
    return f"The strongest {word} is {row.name}: {row_text(row, '+')}, p {p}."


# --- Explanation ---

BATCHES = {  # -> titles
    "train": "training data",
    "validation": "held-out data",
    "evaluation": "evaluation",
    "random": "random states",
    "gap": "gap",
    "ratio": "held-out / training",
}
# Columns that begin so are no measures. The overestimation has the return in it.
NO_MEASURES = ("score", "seconds", "ratio/score", "evaluation/overestimation")
MOST_MISSING = 0.05  # of a measure's runs; it is left out if more lack it
PERMUTATIONS = 9999
FEWEST = 4  # regularisers for a test between them: three have 6 permutations, and p of 1/6 or more


def kind(column):
    """Return what a column measures: "pca_rank" on any batch, "weight_norm" of any layer."""
    first, _, rest = column.partition("/")
    return rest if first in BATCHES else first


def measures(rows):
    """Return the columns of what is inside the actor: those of INSIDE, and those of other kinds.

    Each other kind counts once: on the first batch in BATCHES that has it.
    """
    inside = [column for column in tables.INSIDE if not column.startswith(NO_MEASURES)]
    found = [column for column in inside if column in rows]
    kinds = {kind(column) for column in tables.INSIDE}
    others = []
    for column in rows.select_dtypes("number"):
        is_measure = "/" in column and not column.startswith(NO_MEASURES)
        if is_measure and kind(column) not in kinds:
            others.append(column)
    for batch in BATCHES:
        for column in others:
            if column.startswith(f"{batch}/") and kind(column) not in kinds:
                found.append(column)
                kinds.add(kind(column))
    return found + [column for column in others if column.split("/")[0] not in BATCHES]


class Sample(NamedTuple):
    """The N runs of an explanation.

    `about` has their dataset, label and block, which is a number. `values` (N, measures + 1) are
    the measures, and last the score, as `deviations` returns them.
    """

    about: pd.DataFrame
    values: np.ndarray
    columns: list  # of the measures
    missing: list  # measures that too few runs have
    constant: list  # measures that vary in no block
    dropped: int  # runs that lack a measure


def make_sample(rows):
    rows = tables.with_ratios(rows[~rows.index.duplicated()])  # a run may have several labels
    columns = measures(rows)
    rows = rows.replace({column: [np.inf, -np.inf] for column in columns}, np.nan)
    lacking = rows[columns].isna().mean()
    missing = [column for column in columns if lacking[column] > MOST_MISSING]
    columns = [column for column in columns if column not in missing]
    complete = rows.dropna(subset=columns)
    dropped = len(rows) - len(complete)
    complete = complete[complete.groupby(BLOCK)["final"].transform("size") > 1]
    values = deviations(complete, columns)
    constant = [column for column in columns if not values[column].any()]
    columns = [column for column in columns if column not in constant]
    about = complete[["dataset", "label"]].assign(block=complete.groupby(BLOCK).ngroup())
    values = values[[*columns, "final"]].to_numpy()
    return Sample(about, values, columns, missing, constant, dropped)


def deviations(rows, columns):
    """Return measures and final scores as deviations from their means over the block.

    A measure's are divided by their standard deviation on the dataset.
    """
    values = rows[[*columns, "final"]]
    means = values.groupby([rows[name] for name in BLOCK]).transform("mean")
    found = values - means
    found = found.where(found.abs() > 1e-9 * values.abs(), 0)  # without what is only rounding
    squares = (found[columns] ** 2).groupby(rows["dataset"]).transform("mean")
    found[columns] = (found[columns] / np.sqrt(squares)).fillna(0)  # 0 / 0
    return found


def block_weights(number, reps):
    """Return how often each block counts (reps + 1, blocks): once, and then as a bootstrap drew."""
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(number, np.full(number, 1 / number), reps)
    return np.concatenate([np.ones((1, number)), drawn])


def block_products(sample):
    """Return each block's sums of products of columns (blocks, measures + 1, measures + 1)."""
    blocks = sample.about["block"].to_numpy()
    groups = [sample.values[blocks == block] for block in range(blocks.max() + 1)]
    return np.stack([own.T @ own for own in groups])


def slopes_and_shares(products):
    """Return slopes, and shares of the score's sum of squares, each (reps + 1, measures)."""
    squares = varying(np.diagonal(products, axis1=1, axis2=2))
    slopes = products[:, :-1, -1] / squares[:, :-1]
    return slopes, slopes**2 * squares[:, :-1] / squares[:, -1:]


def varying(squares):
    """Return sums of squares, with NaN where a resample has nothing that varies."""
    return np.where(squares > 1e-9 * squares[0].clip(1), squares, np.nan)


def shares_beside(products, columns):
    """Return what each measure adds to the share explained by those of other kinds.

    The shares are (reps + 1, measures). Other columns of a measure's own kind, such as the same on
    other states, are left aside. A measure that those of other kinds determine adds 0.
    """
    squares = np.diagonal(products, axis1=1, axis2=2)
    kinds = np.array([kind(column) for column in columns])
    added = np.zeros((len(products), len(columns)))
    for name in set(kinds):
        own = np.flatnonzero(kinds == name)
        others = np.flatnonzero(kinds != name)
        rest = without(products, others, [*own, len(columns)])
        left = np.diagonal(rest, axis1=1, axis2=2)[:, :-1]
        is_determined = left <= 1e-6 * squares[:, own]
        explained = rest[:, :-1, -1] ** 2 / np.where(is_determined, np.inf, left)
        added[:, own] = explained / varying(squares)[:, -1:]
    return added


def without(products, others, kept):
    """Return sums of products of what is left of the columns `kept`.

    What the columns `others` explain of them by least squares is taken out.
    """
    scale = np.sqrt(np.diagonal(products, axis1=1, axis2=2)).clip(1e-9)
    scaled = products / scale[:, :, None] / scale[:, None, :]
    of_others = scaled[:, others][:, :, others]
    of_others = of_others + 1e-9 * np.eye(len(others))  # they may be collinear
    cross = scaled[:, others][:, :, kept]
    explained = cross.transpose(0, 2, 1) @ np.linalg.solve(of_others, cross)
    rest = scaled[:, kept][:, :, kept] - explained
    return rest * scale[:, kept, None] * scale[:, None, kept]


class Rectangle(NamedTuple):
    """A dataset's runs, of seeds that all have the same labels.

    `values` (columns, seeds, labels) are a Sample's, as deviations from their means over the
    labels. `blocks` (seeds,) are the seeds' places among all blocks.
    """

    values: np.ndarray
    blocks: np.ndarray


def rectangles(sample):
    """Return each dataset's Rectangle, if it has two seeds and two labels.

    A seed with fewer than half of the labels is left out, and then each label that a seed lacks.
    """
    about = sample.about.assign(place=range(len(sample.about)))
    found = []
    for _, own in about.groupby("dataset"):
        places = own.pivot(index="block", columns="label", values="place")
        places = places.dropna(thresh=places.shape[1] / 2).dropna(axis=1)
        if min(places.shape) < 2:
            continue
        values = sample.values[places.to_numpy(int)].transpose(2, 0, 1)
        values = values - values.mean(2, keepdims=True)
        found.append(Rectangle(values, places.index.to_numpy()))
    return found


def within_slopes(found, weights):
    """Return slopes (reps + 1, measures) over runs of the same dataset and label.

    They are points per standard deviation of a measure among such runs.
    """
    products = 0
    squares = 0
    for values, blocks in found:
        counts = weights[:, blocks]
        total = counts.sum(1)[:, None]
        sums = np.einsum("rs,csl->rcl", counts, values)
        means = sums / total.clip(1)[:, :, None]  # over the seeds, to be taken out
        of_means = np.einsum("rcl,rl->rc", means, means[:, -1])
        products += np.einsum("rs,csl->rc", counts, values * values[-1]) - total * of_means
        of_means = (means**2).sum(2)
        squares += np.einsum("rs,csl->rc", counts, values**2) - total * of_means
    number = sum(values[0].size for values, _ in found)
    standard_deviations = np.sqrt(squares[0].clip(0) / number)
    slopes = products / varying(squares) * standard_deviations
    return slopes[:, :-1]


def permuted_p(tables_of_products):
    """Return p values (measures,) by permuting the scores of units, such as seeds.

    An entry of a table (measures, units, units) is a measure of one unit times the score of
    another. So the sum over the diagonals is how measure and score go together. Each table is
    permuted by itself.
    """
    rng = np.random.default_rng(0)
    drawn = 0
    observed = 0
    for table in tables_of_products:
        units = np.arange(table.shape[1])
        orders = rng.permuted(np.tile(units, (PERMUTATIONS, 1)), axis=1)
        drawn = drawn + table[:, units, orders].sum(2)
        observed = observed + np.trace(table, axis1=1, axis2=2)
    is_as_large = np.abs(drawn) >= (1 - 1e-9) * np.abs(observed)[:, None]
    return (1 + is_as_large.sum(1)) / (1 + PERMUTATIONS)


def within_p(found):
    """Return p values (measures,) over runs of the same dataset and label.

    The scores of a dataset's seeds are permuted, each seed with all of its runs. So what
    regularisers do to scores and measures is taken out first, and explains nothing here.
    """
    products = []
    for values, _ in found:
        values = values - values.mean(1, keepdims=True)
        values = np.where(np.abs(values) > 1e-9, values, 0)  # without what is only rounding
        products.append(np.einsum("csl,tl->cst", values[:-1], values[-1]))
    return permuted_p(products)


def regulariser(label, chosen):
    """Return the one regulariser of a label, at any strength, or None."""
    name = label.split("(")[0]
    is_one = "+" not in label and (name in chosen or "=" in name)
    return name.split("=")[0] if is_one else None


def between_p(sample, products, chosen):
    """Return p values (measures,): do regularisers that move a measure more also gain more?

    Chance has two sources. One is which regulariser moves which measure: for it the regularisers
    are permuted. The other is the seeds, which all regularisers share: for it Student's t is over
    the blocks. p is the larger one. Also return the number of regularisers.
    """
    means = regulariser_means(sample, chosen)
    number = means.shape[1]
    if number < FEWEST:
        return np.full(len(sample.columns), np.nan), number
    means = means - means.mean(1, keepdims=True)
    by_regulariser = permuted_p([np.einsum("cud,vd->cuv", means[:-1], means[-1])])
    by_block = tables.p_values(pd.DataFrame(products[:, :-1, -1].T)).to_numpy()
    return np.maximum(by_regulariser, by_block), number


def regulariser_means(sample, chosen):
    """Return mean values (measures + 1, regularisers, datasets).

    They are of runs with one regulariser, if it is on all datasets. Those of combinations would
    not be independent.
    """
    names = [regulariser(label, chosen) for label in sample.about["label"]]
    datasets = sample.about["dataset"].to_numpy()
    values = pd.DataFrame(sample.values).assign(name=names, dataset=datasets)
    means = values.groupby(["name", "dataset"]).mean().unstack("dataset").dropna()
    number = sample.values.shape[1]
    shape = (len(means), number, means.shape[1] // number)
    return means.to_numpy().reshape(shape).transpose(1, 0, 2)


def rests_on(rows, chosen, columns):
    """Return {measure's title: regularisers on which its small p between regularisers rests}.

    Without the runs of one of these, p is LEVEL or more before any correction.
    """
    found = {measure_title(column): [] for column in columns}
    if not found:
        return found
    names = [{word.split("(")[0] for word in label.split("+")} for label in rows["label"]]
    for name in chosen:
        is_without = np.array([name not in own for own in names])
        if is_without.all():
            continue
        sample = make_sample(rows[is_without])
        p, _ = between_p(sample, block_products(sample), chosen)
        p = dict(zip(sample.columns, p))
        for column in columns:
            if not p.get(column, 1) < tables.LEVEL:  # it may be NaN
                found[measure_title(column)].append(name)
    return found


def corrected_p(sample, products, found, chosen):
    """Return p values (measures, 2) between regularisers and with the same, and their number."""
    between, number = between_p(sample, products, chosen)
    return tables.holm(np.stack([between, within_p(found)], axis=1)), number


def label_share(found):
    """Return the share of the score's variance that labels explain, each dataset's for itself.

    Also return the share that labels without meaning would explain by chance.
    """
    scores = [values[-1] for values, _ in found]
    by_label = sum(len(own) * (own.mean(0) ** 2).sum() for own in scores)
    by_chance = np.mean([1 / len(own) for own in scores])
    return by_label / sum((own**2).sum() for own in scores), by_chance


QUANTITIES = {  # -> titles in the table and the figure
    "slope": "points per standard deviation",
    "alone": "share alone (%)",
    "beside": "share beside other kinds (%)",
    "within": "points, same regulariser",
}
TESTED = {"slope": "between", "within": "within"}  # -> the column of p


class Explanation(NamedTuple):
    """What the measures explain.

    `estimates` has rows of quantity, label, point, low, high, where a label is a measure's title.
    `p` has the columns between and within, corrected together. The shares are of the score's
    variance within blocks.
    """

    sample: Sample
    estimates: pd.DataFrame
    p: pd.DataFrame
    regularisers: int  # behind p's column between
    rests_on: dict  # of what is found between regularisers
    together: float  # share of all measures
    label_share: float
    chance_share: float  # of labels that mean nothing


def explain(rows, chosen, reps):
    """Return an Explanation, or None if there are too few runs."""
    sample = make_sample(rows)
    found = rectangles(sample)
    number = sample.about["block"].nunique()
    if not sample.columns or not found or number < 3 or not sample.values[:, -1].any():
        return None
    products = block_products(sample)
    p, regularisers = corrected_p(sample, products, found, chosen)
    weights = block_weights(number, reps)
    totals = np.tensordot(weights, products, 1)
    slopes, shares = slopes_and_shares(totals)
    values = {
        "slope": slopes,
        "alone": 100 * shares,
        "beside": 100 * shares_beside(totals, sample.columns),
        "within": within_slopes(found, weights),
    }
    names = [measure_title(column) for column in sample.columns]
    order = np.argsort(-shares[0], kind="stable")
    estimates = [
        long_rows(quantity, values[quantity], names).iloc[order] for quantity in QUANTITIES
    ]
    is_significant = p[:, 0] < tables.LEVEL
    significant = [column for column, own in zip(sample.columns, is_significant) if own]
    share, by_chance = label_share(found)
    return Explanation(
        sample=sample,
        estimates=pd.concat(estimates),
        p=pd.DataFrame(p, names, ["between", "within"]).iloc[order],
        regularisers=regularisers,
        rests_on=rests_on(rows, chosen, significant),
        together=share_of_all(totals[:1]),
        label_share=share,
        chance_share=by_chance,
    )


def long_rows(quantity, values, names):
    """Return rows of quantity, label, point, low, high of values (reps + 1, measures)."""
    low, high = pd.DataFrame(values[1:]).quantile([0.025, 0.975]).to_numpy()
    rows = dict(quantity=quantity, label=names, point=values[0], low=low, high=high)
    return pd.DataFrame(rows)


def share_of_all(products):
    """Return the share of the score's variance that all measures explain, of products (1, ...)."""
    score = products.shape[1] - 1
    left = without(products, np.arange(score), [score])
    return 1 - left[0, 0, 0] / products[0, -1, -1]


def measure_title(column):
    """Return a measure's title: that of INSIDE, or "actor loss (training data)" and the like."""
    if column in tables.INSIDE:
        return tables.INSIDE[column][0]
    first, _, rest = column.partition("/")
    if first in BATCHES:
        return f"{rest.replace('_', ' ')} ({BATCHES[first]})"
    return f"{first.replace('_', ' ')}, {rest}"


def explanation_table(title, found):
    """Return the table of an Explanation."""
    cells = pd.DataFrame(index=found.p.index)
    for quantity, name in QUANTITIES.items():
        own = found.estimates[found.estimates["quantity"] == quantity]
        sign = "" if name.startswith("share") else "+"
        cells[name] = [row_text(row, sign) for row in own.itertuples()]
    cells["p, between regularisers"] = found.p["between"].map(bold_p)
    cells["p, same regulariser"] = found.p["within"].map(bold_p)
    return tables.Table(title, cells, explanation_note(found), "measure")


def bold_p(p):
    return tables.bold(tables.p_text(p) or "too few", p)


def explanation_note(found):
    sample = found.sample
    number = len(sample.about)
    blocks = sample.about["block"].nunique()
    by_chance = min(1, len(sample.columns) / (number - blocks))
    notes = [
        explained(found),
        f"{number} runs in {blocks} blocks: a block is one seed on one dataset.",
        "Scores and measures are deviations from their block's mean. The baseline's run is not "
        "subtracted: its luck would be in all differences, of scores and of measures.",
        "Points per standard deviation: the slope over all runs.",
        "Points, same regulariser: the slope over runs that differ in the seed alone, per standard "
        "deviation among these.",
        "Shares are of the scores' variance within blocks: a measure's alone, and what it adds to "
        "those of other kinds.",
        f"All measures explain {percent(found.together)}; as many random numbers would explain "
        f"about {percent(by_chance)}.",
        f"The regularisers, on each dataset for itself, explain {percent(found.label_share)}; "
        f"labels given at random would explain {percent(found.chance_share)}.",
        "In brackets 95 % intervals by a bootstrap of blocks, which are too narrow for few blocks. "
        "They hold for these regularisers. p asks whether others would show the same.",
        "p is corrected by Holm over both columns.",
        between_text(found.regularisers),
        f"With the same regulariser it is by permuting seeds. {tables.BOLD}",
    ]
    if any(column.startswith("evaluation/") for column in sample.columns):
        notes.append(
            "What is measured in evaluation may follow from the score: a policy that fails visits "
            "other states."
        )
    if sample.missing:
        notes.append(f"Left out, since too few runs have it: {titles(sample.missing)}.")
    if sample.constant:
        notes.append(f"Left out, since it varies in no block: {titles(sample.constant)}.")
    if sample.dropped:
        notes.append(f"Left out: {sample.dropped} runs that lack a measure.")
    return " ".join(notes)


def percent(share):
    return f"{100 * share:.0f} %"


def titles(columns):
    return ", ".join(measure_title(column) for column in columns)


def between_text(regularisers):
    """Return a sentence on p between regularisers, given how many there are."""
    if regularisers < FEWEST:
        return f"p between regularisers needs {FEWEST} that are alone in runs on every dataset."
    return (
        "Between regularisers it is the larger of two: by permuting the "
        f"{regularisers} that are alone in runs on every dataset, and by Student's t over the "
        "blocks."
    )


def explained(found):
    """Return a sentence on what explains the score between regularisers, and one within them."""
    between = []
    for name in found.p.index[found.p["between"] < tables.LEVEL]:
        text = name
        needed = ", ".join(found.rests_on[name])
        if needed:
            text += f" (but without {needed} p is {tables.LEVEL} or more, before correction)"
        between.append(text)
    within = found.p.index[found.p["within"] < tables.LEVEL]
    nothing = "no measure beyond chance"
    if found.regularisers < FEWEST:
        first = "There are too few regularisers to test what explains the score between them."
    else:
        first = f"What explains the score between regularisers: {', '.join(between) or nothing}."
    return (
        f"{first} What explains the score between runs of the same regulariser: "
        f"{', '.join(within) or nothing}."
    )
