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
    """Return a label such as "DO+LN" if each regulariser has the strength chosen for it alone.

    Return None for all others. A combination for which the paper chose other strengths is one.
    """
    if label == BASELINE:
        return label
    names = [word.split("(")[0] for word in label.split("+")]
    for name in names:
        flags = chosen.get(name)
        if flags is None or any(config[flag] != value for flag, value in flags.items()):
            return None
    return "+".join(names)


def parts(name):
    """Return the signs by which a combination's term is made of scores: {"baseline": 1, ...}.

    They add up to what the scores of its parts, of single regularisers and pairs, don't add up to:
    DO+LN - DO - LN + baseline.
    """
    words = name.split("+")
    signs = {}
    for size in range(len(words) + 1):
        for some in itertools.combinations(words, size):
            signs["+".join(some) or BASELINE] = (-1) ** (len(words) - size)
    return signs


def contrasts(rows, chosen):
    """Return terms and gains over the baseline: a row for each combination of two or three.

    A column is a block. It has a value where the block has all parts, as runs of their own. (Where
    the baseline has dropout, DO+LN is LN's run.)
    """
    pairs = zip(rows["label"], rows["config"])
    names = [combination(label, config, chosen) for label, config in pairs]
    rows = rows.assign(name=names, run=rows.index).dropna(subset="name")
    scores = rows.pivot(index=BLOCK, columns="name", values="final")
    runs = rows.pivot(index=BLOCK, columns="name", values="run")
    terms = {}
    gains = {}
    for name in rows["name"].unique():
        signs = parts(name)
        if len(signs) not in (4, 8) or not scores.columns.isin(signs).sum() == len(signs):
            continue
        own = scores[list(signs)].dropna()
        own = own[runs.loc[own.index, list(signs)].nunique(axis=1) == len(signs)]
        if len(own) > 1:
            terms[name] = (own * signs).sum(axis=1).round(9)  # no p value of what is only rounding
            gains[name] = own[name] - own[BASELINE]
    return pd.DataFrame(terms).T, pd.DataFrame(gains).T


def interactions(rows, chosen, reps):
    """Return a row for each term that can be told: point, low, high, p, blocks, gain."""
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


def untold(rows, chosen, found):
    """Return the pairs and triples that are in the rows, but not among what was found."""
    names = []
    for label in rows["label"].cat.categories:
        words = label.split("+")
        if len(words) in (2, 3) and set(words) <= set(chosen) and label not in found.index:
            names.append(label)
    return names


def interaction_table(title, found, missing):
    """Return the table of interactions. `missing` are those that can't be told."""
    cells = pd.DataFrame(index=found.index)
    cells["sum of the parts"] = (found["gain"] - found["point"]).map("{:+.1f}".format)
    cells["together"] = found["gain"].map("{:+.1f}".format)
    cells["interaction"] = found.apply(effect_text, axis=1)
    cells["p"] = found["p"].map(tables.p_text)
    cells["blocks"] = found["blocks"].map(str)
    note = (
        f"{strongest(found)} Score = block + a term for each regulariser, each pair and each "
        "triple, by least squares; a block is one seed on one dataset. So an interaction is the "
        "gain together that the parts don't add up to. In brackets 95 % intervals by a bootstrap "
        "of blocks, which are too narrow for few blocks. p is Student's over the blocks, corrected "
        "by Holm over this table. Bold: p below 0.05."
    )
    return tables.Table(title, cells, f"{note} {missing_text(missing)}".strip())


def missing_text(missing):
    """Return a sentence of the combinations that can't be told, or nothing."""
    if not missing:
        return ""
    names = ", ".join(missing[:12])
    more = f" and {len(missing) - 12} more" if len(missing) > 12 else ""
    return (
        f"Can't be told, since no two blocks have all parts at the same strengths: {names}{more}."
    )


def effect_text(row):
    text = f"{row['point']:+.1f} ({row['low']:+.1f} – {row['high']:+.1f})"
    return tables.bold(text, row["p"])


def strongest(found):
    """Return a sentence on the strongest synergy and the strongest conflict that can be told."""
    told = found[found["p"] < tables.LEVEL]
    sentences = []
    for word, own in (("synergy", told[told["point"] > 0]), ("conflict", told[told["point"] < 0])):
        if own.empty:
            sentences.append(f"No {word} can be told from chance.")
        else:
            name = own["point"].abs().idxmax()
            text = effect_text(own.loc[name]).strip("*")
            p = tables.p_text(own.loc[name, "p"])
            sentences.append(f"The strongest {word} is {name}: {text}, p {p}.")
    return " ".join(sentences)


# --- Explanation ---

BATCHES = ["train", "validation", "evaluation", "random", "gap", "ratio"]
NO_MEASURES = ("score", "seconds", "ratio/score")
MOST_MISSING = 0.05  # of a measure's runs; it is left out if more lack it
PERMUTATIONS = 9999


def kind(column):
    """Return what a column measures: "pca_rank" on any batch, "weight_norm" of any layer."""
    first, _, rest = column.partition("/")
    return rest if first in BATCHES else first


def measures(rows):
    """Return the columns of what is inside the actor: those of INSIDE, and other kinds' columns.

    Of a kind that is measured on several batches but isn't in INSIDE it is the first batch's.
    """
    found = [column for column in tables.INSIDE if column in rows]
    kinds = {kind(column) for column in tables.INSIDE}
    others = [column for column in rows.select_dtypes("number") if "/" in column]
    for batch in [*BATCHES, None]:
        own = [column for column in others if is_of(column, batch)]
        own = [column for column in own if kind(column) not in kinds]
        kinds |= {kind(column) for column in own}
        found += [column for column in own if not column.startswith(NO_MEASURES)]
    return found


def is_of(column, batch):
    first = column.split("/")[0]
    return first == batch or (batch is None and first not in BATCHES)


class Sample(NamedTuple):
    """The N runs of an explanation.

    `about` has their dataset, label and block, which is a number. `values` (N, measures + 1) are
    the measures, and last the score, as deviations from their means over the block. The measures
    are divided by the standard deviations of these within the dataset.
    """

    about: pd.DataFrame
    values: np.ndarray
    columns: list  # of the measures
    missing: list  # measures that too few runs have
    constant: list  # measures that vary in no block
    dropped: int  # runs that lack a measure


def make_sample(rows):
    rows = tables.with_ratios(rows[~rows.index.duplicated()])
    columns = measures(rows)
    rows = rows.replace({column: [np.inf, -np.inf] for column in columns}, np.nan)
    lacking = rows[columns].isna().mean()
    missing = list(lacking[lacking > MOST_MISSING].index)
    columns = [column for column in columns if column not in missing]
    complete = rows.dropna(subset=columns)
    dropped = len(rows) - len(complete)
    complete = complete[complete.groupby(BLOCK)["final"].transform("size") > 1]
    values = complete[[*columns, "final"]]
    deviations = values - values.groupby([complete[name] for name in BLOCK]).transform("mean")
    deviations = deviations.where(deviations.abs() > 1e-9 * values.abs(), 0)  # only rounding
    squares = (deviations[columns] ** 2).groupby(complete["dataset"]).transform("mean")
    deviations[columns] = (deviations[columns] / np.sqrt(squares)).fillna(0)
    about = complete[["dataset", "label"]].assign(block=complete.groupby(BLOCK).ngroup())
    constant = [column for column in columns if not deviations[column].any()]
    columns = [column for column in columns if column not in constant]
    values = deviations[[*columns, "final"]].to_numpy()
    return Sample(about, values, columns, missing, constant, dropped)


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

    Other columns of its own kind, such as the same on other states, are left aside. What the others
    determine adds 0.
    """
    kinds = np.array([kind(column) for column in columns])
    added = np.zeros((len(products), len(columns)))
    for name in set(kinds):
        others = np.flatnonzero(kinds != name)
        own = np.flatnonzero(kinds == name)
        rest = without(products, others, [*own, len(columns)])
        squares = np.diagonal(products, axis1=1, axis2=2)
        left = np.diagonal(rest, axis1=1, axis2=2)[:, :-1]
        is_new = left > 1e-6 * squares[:, own]
        gain = rest[:, :-1, -1] ** 2 / np.where(is_new, left, 1) / squares[:, -1:]
        added[:, own] = np.where(is_new, gain, 0)
    return added


def without(products, others, kept):
    """Return the sums of products of the columns `kept`, less what the columns `others` explain."""
    scale = np.sqrt(np.diagonal(products, axis1=1, axis2=2)).clip(1e-9)
    scaled = products / scale[:, :, None] / scale[:, None, :]
    inner = scaled[:, others][:, :, others] + 1e-9 * np.eye(len(others))  # which may be collinear
    cross = scaled[:, others][:, :, kept]
    rest = scaled[:, kept][:, :, kept] - cross.transpose(0, 2, 1) @ np.linalg.solve(inner, cross)
    return rest * scale[:, kept, None] * scale[:, None, kept]


class Rectangle(NamedTuple):
    """A dataset's runs whose labels all of its seeds have: values (columns, seeds, labels).

    `blocks` are the seeds' places among all blocks.
    """

    values: np.ndarray
    blocks: np.ndarray


def rectangles(sample):
    """Return each dataset's Rectangle, if it has two seeds and two labels."""
    about = sample.about.assign(place=range(len(sample.about)))
    found = []
    for _, own in about.groupby("dataset"):
        places = own.pivot(index="block", columns="label", values="place")
        places = places.dropna(thresh=places.shape[1] / 2).dropna(axis=1)
        if min(places.shape) > 1:
            values = sample.values[places.to_numpy(int)].transpose(2, 0, 1)
            found.append(Rectangle(values - values.mean(2, keepdims=True), places.index.to_numpy()))
    return found


def within_slopes(found, weights):
    """Return slopes (reps + 1, measures) over runs of the same dataset and label.

    They are points per standard deviation of a measure among such runs.
    """
    products = squares = 0
    for values, blocks in found:
        own = weights[:, blocks]
        total = own.sum(1)[:, None]
        means = np.einsum("rs,csl->rcl", own, values) / total.clip(1)[:, :, None]
        products += np.einsum("rs,csl->rc", own, values * values[-1])
        products -= total * np.einsum("rcl,rl->rc", means, means[:, -1])
        squares += np.einsum("rs,csl->rc", own, values**2) - total * (means**2).sum(2)
    number = sum(values[0].size for values, _ in found)
    return (products / varying(squares) * np.sqrt(squares[0].clip(0) / number))[:, :-1]


def permuted_p(tables_of_products):
    """Return p values (measures,) of sums over the diagonals of tables (measures, units, units).

    An entry is a measure of one unit times the score of another. The units' scores are permuted,
    in each table by itself.
    """
    rng = np.random.default_rng(0)
    drawn = 0
    observed = 0
    for table in tables_of_products:
        number = table.shape[1]
        order = rng.permuted(np.tile(np.arange(number), (PERMUTATIONS, 1)), axis=1)
        drawn = drawn + table[:, np.arange(number), order].sum(2)
        observed = observed + np.trace(table, axis1=1, axis2=2)
    is_as_large = np.abs(drawn) >= (1 - 1e-9) * np.abs(observed)[:, None]
    return (1 + is_as_large.sum(1)) / (1 + PERMUTATIONS)


def within_p(found):
    """Return p values by permuting the seeds of each dataset, each with all of its runs.

    A regulariser's effects on score and measures are the same in all of these.
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
    """Return p values of a measure and the score going together over regularisers.

    Each is the larger of two. Which regulariser moves which measure is chance: they are permuted,
    each with its scores on all datasets. Combinations share regularisers, so that they don't count.
    And the seeds are chance, by which similar regularisers are good or bad together: hence
    Student's t over the blocks. Also return the number of regularisers.
    """
    names = [regulariser(label, chosen) for label in sample.about["label"]]
    values = pd.DataFrame(sample.values).assign(dataset=sample.about["dataset"].to_numpy())
    means = values.groupby([pd.Series(names), "dataset"]).mean().unstack("dataset").dropna()
    number = len(means)
    if number < 3:
        return np.full(len(sample.columns), np.nan), number
    means = means.to_numpy().reshape(number, len(sample.columns) + 1, -1).transpose(1, 0, 2)
    means = means - means.mean(1, keepdims=True)
    by_regulariser = permuted_p([np.einsum("cud,vd->cuv", means[:-1], means[-1])])
    by_block = tables.p_values(pd.DataFrame(products[:, :-1, -1].T)).to_numpy()
    return np.maximum(by_regulariser, by_block), number


def rests_on(rows, chosen, columns):
    """Return the regularisers without whose runs a measure's p between regularisers isn't low.

    They are lists by the measures' titles. This p is not corrected.
    """
    found = {measure_title(column): [] for column in columns}
    names = [{word.split("(")[0] for word in label.split("+")} for label in rows["label"]]
    for name in chosen if columns else ():
        is_without = np.array([name not in own for own in names])
        if is_without.all():
            continue
        sample = make_sample(rows[is_without])
        p, _ = between_p(sample, block_products(sample), chosen)
        low = {column for column, own in zip(sample.columns, p) if own < tables.LEVEL}
        for column in set(columns) - low:
            found[measure_title(column)].append(name)
    return found


def corrected_p(sample, products, found, chosen):
    """Return p values (measures, 2) between regularisers and with the same, and their number."""
    between, number = between_p(sample, products, chosen)
    return tables.holm(np.stack([between, within_p(found)], axis=1)), number


def label_share(found):
    """Return the share of the score's variance that labels explain, and what they do by chance."""
    scores = [values[-1] for values, _ in found]
    by_label = sum(len(own) * (own.mean(0) ** 2).sum() for own in scores)
    by_chance = np.mean([1 / len(own) for own in scores])
    return by_label / sum((own**2).sum() for own in scores), by_chance


QUANTITIES = {  # -> titles in the table and the figure
    "slope": "points per standard deviation",
    "alone": "share alone (%)",
    "beside": "share beside the others (%)",
    "within": "points, same regulariser",
}


TESTED = {"slope": "between", "within": "within"}  # -> the column of p


class Explanation(NamedTuple):
    """What the measures explain.

    `estimates` has rows of quantity, label, point, low, high. `p` has the columns between and
    within, corrected together. The shares are of the score's variance within blocks.
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
    weights = block_weights(number, reps)
    products = block_products(sample)
    p, regularisers = corrected_p(sample, products, found, chosen)
    totals = np.tensordot(weights, products, 1)
    slopes, shares = slopes_and_shares(totals)
    values = {
        "slope": slopes,
        "alone": 100 * shares,
        "beside": 100 * shares_beside(totals, sample.columns),
        "within": within_slopes(found, weights),
    }
    names = [measure_title(column) for column in sample.columns]
    told = [column for column, own in zip(sample.columns, p[:, 0]) if own < tables.LEVEL]
    order = np.argsort(-shares[0], kind="stable")
    size = len(names)
    left = without(totals[:1], np.arange(size), [size])[0, 0, 0]
    return Explanation(
        sample,
        pd.concat([long(quantity, values[quantity], names, order) for quantity in QUANTITIES]),
        pd.DataFrame(p, names, ["between", "within"]).iloc[order],
        regularisers,
        rests_on(rows, chosen, told),
        1 - left / totals[0, -1, -1],
        *label_share(found),
    )


def long(quantity, values, names, order):
    """Return rows of quantity, label, point, low, high of values (reps + 1, measures)."""
    low, high = pd.DataFrame(values[1:]).quantile([0.025, 0.975]).to_numpy()
    rows = dict(quantity=quantity, label=names, point=values[0], low=low, high=high)
    return pd.DataFrame(rows).iloc[order]


def measure_title(column):
    return tables.INSIDE.get(column, (column,))[0]


def explanation_table(title, found):
    """Return the table of an Explanation."""
    cells = pd.DataFrame(index=found.p.index)
    for quantity, name in QUANTITIES.items():
        own = found.estimates[found.estimates["quantity"] == quantity].set_index("label")
        sign = "" if name.startswith("share") else "+"
        cells[name] = [interval_text(row, sign) for row in own.itertuples()]
    for column, name in (("between", "p, between regularisers"), ("within", "p, same regulariser")):
        cells[name] = [tables.bold(tables.p_text(p) or "too few", p) for p in found.p[column]]
    return tables.Table(title, cells, explanation_note(found), "measure")


def interval_text(row, sign):
    if np.isnan(row.point):  # the measure is the same in all these runs
        return ""
    return f"{row.point:{sign}.1f} ({row.low:{sign}.1f} – {row.high:{sign}.1f})"


def explanation_note(found):
    sample = found.sample
    blocks = sample.about["block"].nunique()
    together, label_share, chance_share = (
        f"{100 * share:.0f} %" for share in (found.together, found.label_share, found.chance_share)
    )
    notes = [
        f"{explained(found)} {len(sample.about)} runs in {blocks} blocks: a block is one seed on "
        "one dataset. Scores and measures are deviations from their block's mean. The baseline's "
        "run is not subtracted: its chance would be in all differences, and correlate scores with "
        "measures. Shares are of the scores' variance within blocks: a measure's alone, and what "
        f"it adds to those of other kinds. All measures explain {together}. Which regulariser it "
        f"was explains {label_share}; names without meaning would explain {chance_share}. The same "
        "regulariser: over runs that differ in their seeds alone. In brackets 95 % intervals by a "
        "bootstrap of blocks, which are too narrow for few blocks. p is corrected by Holm over "
        "both columns. Between regularisers it is the larger of two: by permuting the "
        f"{found.regularisers} single ones, and by Student's t over the blocks. With the same one "
        "it is by permuting seeds. Bold: p below 0.05."
    ]
    if sample.missing:
        notes.append(f"Left out, since too few runs have it: {titles(sample.missing)}.")
    if sample.constant:
        notes.append(f"Left out, since it varies in no block: {titles(sample.constant)}.")
    if sample.dropped:
        notes.append(f"Left out: {sample.dropped} runs that lack a measure.")
    return " ".join(notes)


def titles(columns):
    return ", ".join(measure_title(column) for column in columns)


def explained(found):
    """Return sentences on what explains the score, between regularisers and with the same one."""
    sentences = []
    for column, where in (("between", "regularisers"), ("within", "runs of the same regulariser")):
        told = list(found.p.index[found.p[column] < tables.LEVEL])
        if column == "between":
            told = [name + without_text(found.rests_on[name]) for name in told]
        names = ", ".join(told) or "no measure beyond chance"
        sentences.append(f"What explains the score between {where}: {names}.")
    return " ".join(sentences)


def without_text(names):
    """Return what is said of an explanation that rests on single regularisers."""
    return f" (but p isn't below 0.05 without {', '.join(names)})" if names else ""
