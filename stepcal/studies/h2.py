"""H2: every variant fitted on the training split and scored on the test split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from stepcal.calibration.variants import VARIANTS, fit_variant
from stepcal.datasets.splits import STUDY_FRACTIONS, temporal_split
from stepcal.evaluation.step_errors import bias_table, score_steps
from stepcal.metrics import BOOTSTRAP_RESAMPLES
from stepcal.specs.hardware import load_accelerator
from stepcal.studies.study import ACCELERATOR, Tables

BIAS_VARIANTS = ("blackbox", "xgboost", "global9", "model36")


def run_h2(
    steps: pd.DataFrame,
    *,
    variants: Sequence[str] = VARIANTS,
    fractions: tuple[float, float] = STUDY_FRACTIONS,
    n_resamples: int | None = BOOTSTRAP_RESAMPLES,
    seed: int = 0,
) -> tuple[Tables, dict[str, str]]:
    """Fit every variant on the training split and score it on the test split.

    Parameters
    ----------
    steps : DataFrame
        Validated step rows.
    variants : sequence of str
        Of `stepcal.calibration.variants.VARIANTS`.
    fractions : (float, float)
        Shares of the training and validation split.
    n_resamples : int or None
        None leaves the intervals out.
    seed : int

    Returns
    -------
    tables : dict
        ``scores`` (variant, experiment, metric), ``parameters``, ``combinations``, ``singular_values``, ``sizes`` (split
        sizes an experiment), ``variants`` (parameter counts), ``bias``.
    texts : dict
        The fit report of each pooled variant.
    """
    split, accelerator = temporal_split(steps, fractions), load_accelerator(ACCELERATOR)
    scores, estimates, combinations, singular, counts, bias = [], [], [], [], [], []
    texts = {}
    for name in variants:
        fitted = fit_variant(name, split, accelerator)
        predicted = fitted.predict_us(split.test)
        scores.append(score_steps(predicted, split.test, n_resamples=n_resamples, seed=seed).assign(variant=name))
        estimates += [{"variant": name, **vars(e)} for e in fitted.estimates]
        combinations += [{"variant": name, **vars(e)} for e in fitted.combinations]
        counts.append({"variant": name, "n_parameters": fitted.n_parameters, "pooled": fitted.fit is not None})
        if fitted.fit is not None:
            found = fitted.fit.identifiability
            counts[-1]["n_determined"] = found.rank
            ranks = np.arange(1, len(found.singular_values) + 1)
            table = {"variant": name, "rank": ranks, "singular_value": found.singular_values}
            singular.append(pd.DataFrame(table))
            texts[name] = fitted.fit.report()
        if name in BIAS_VARIANTS:
            bias.append(bias_table(predicted, split.test, n_resamples=n_resamples, seed=seed).assign(variant=name))
    tables = {
        "scores": pd.concat(scores, ignore_index=True),
        "parameters": pd.DataFrame(estimates),
        "combinations": pd.DataFrame(combinations),
        "singular_values": pd.concat(singular, ignore_index=True) if singular else pd.DataFrame(),
        "sizes": _split_sizes(split.train, split.valid, split.test),
        "variants": pd.DataFrame(counts),
    }
    if bias:
        tables["bias"] = pd.concat(bias, ignore_index=True)
    return tables, texts


def _split_sizes(train: pd.DataFrame, valid: pd.DataFrame, test: pd.DataFrame) -> pd.DataFrame:
    sizes = {
        f"n_{name}": part.groupby("experiment_id", observed=True).size()
        for name, part in [("train", train), ("valid", valid), ("test", test)]
    }
    return pd.DataFrame(sizes).fillna(0).astype(int).rename_axis("experiment_id").reset_index()
