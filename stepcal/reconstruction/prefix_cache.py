"""Which text each request sent, how long it was, and how much of it the prefix cache held.

The load generator shuffles its prompts once and cycles through them, so request ``i`` sends text ``i % n``. (About one in
a hundred overtook a neighbour on the way and has its length; which of two neighbours has which text makes no difference
here.)
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from stepcal.units import FloatArray, IntArray


def text_of_request(table: pd.DataFrame) -> IntArray:
    """Return the number of each request's text.

    Parameters
    ----------
    table : DataFrame
        Requests with `index`, `run_groups` and `run_prompts_per_group`.
    """
    return (table["index"] % (table["run_groups"] * table["run_prompts_per_group"])).to_numpy(dtype=np.int64)


def known_or_typical_length(table: pd.DataFrame, text: IntArray) -> FloatArray:
    """Return prompt lengths; of failed requests the median of their text, or of their run, where any completed.

    Parameters
    ----------
    table : DataFrame
        Requests with `experiment_id`, `prompt_tokens` and `has_error`.
    text : ndarray of int
        From it.
    """
    known = table["prompt_tokens"].astype(float).where(~table["has_error"].astype(bool))
    run = table["experiment_id"].astype(str)
    of_text = known.groupby([run, pd.Series(text, index=table.index)]).transform("median")
    filled = known.fillna(of_text).fillna(known.groupby(run).transform("median"))
    return np.asarray(filled.fillna(1.0), dtype=np.float64)


def prefill_tokens(table: pd.DataFrame, text: IntArray, prompt_tokens: FloatArray) -> FloatArray:
    """Return the prompt tokens that the prefix cache does not hold, if it never forgets.

    A text that was seen costs what is left after its full blocks, at least one token. One that was not costs all but the
    full blocks of a system prompt that was; which texts share one is not known, so that is an expectation.

    Parameters
    ----------
    table : DataFrame
        Requests in order of arrival with `experiment_id`, `block_size`, `run_system_prompt_tokens`, `run_groups` and
        `run_prompts_per_group`.
    text : ndarray of int
    prompt_tokens : ndarray of float
    """
    block = table["block_size"].to_numpy(dtype=float)
    run = table["experiment_id"].astype(str)
    is_new = ~pd.concat([run, pd.Series(text, index=table.index)], axis=1).duplicated()
    n_seen: FloatArray = is_new.groupby(run).cumsum().to_numpy(dtype=float) - is_new.to_numpy(dtype=float)
    groups, prompts = (table[c].to_numpy(dtype=float) for c in ("run_groups", "run_prompts_per_group"))
    shared = np.floor(table["run_system_prompt_tokens"].to_numpy(dtype=float) / block) * block
    of_new = shared * groups_seen(n_seen, groups, prompts) / groups
    cached = np.where(is_new, of_new, np.floor((prompt_tokens - 1) / block) * block)
    return np.maximum(prompt_tokens - cached, 1.0)


def groups_seen(n_texts: ArrayLike, groups: ArrayLike, prompts_per_group: ArrayLike) -> FloatArray:
    """Return the expected number of groups among some texts drawn without regard to their group, out of equal groups."""
    n, g, m = (np.asarray(a, dtype=float) for a in (n_texts, groups, prompts_per_group))
    return g * (1.0 - np.clip(1.0 - n / (g * m), 0.0, 1.0) ** m)
