"""Request rows from the two published files per experiment: what was sent, and what was measured.

Unverified format: the files' own layout was not seen, only the table joined from them. Accepted is the most plausible
one, in which records carry the joined table's own column names; anything else is refused with the keys found.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from stepcal.datasets.schemas import validate_requests
from stepcal.errors import InputError

REPLAY_FOLDER = "replay_data"
"""Folder of the files in their repository."""

GROUND_TRUTH_SUFFIX = "_ground_truth"
"""Ends the stem of the file with measured latencies; the file with arrivals has the bare experiment id."""

REPLAY_KEYS = ("arrival_time_us", "input_tokens", "output_tokens")
TRUTH_KEYS = ("has_error", "e2e_s", "ttft_s")
INDEX_KEY = "index"


def join_requests(files: Iterable[Path]) -> pd.DataFrame:
    """Join ``<id>.json`` and ``<id>_ground_truth.json`` of each experiment into request rows (unverified format).

    Accepted: a JSON list of records, or an object with exactly one such list among its values. Records of the first
    file hold arrival_time_us, input_tokens, output_tokens; of the second has_error, e2e_s, ttft_s; both `index`. Other
    keys are left aside.

    Parameters
    ----------
    files : iterable of Path
        Both files of every experiment, in any order.

    Returns
    -------
    DataFrame
        Canonical request rows, by experiment and index.

    Raises
    ------
    InputError
        If a file's partner is missing, a file has another layout, or the two disagree on the indices.
    """
    by_stem = {Path(path).stem: Path(path) for path in files}
    experiment_ids = sorted({stem.removesuffix(GROUND_TRUTH_SUFFIX) for stem in by_stem})
    tables = []
    for experiment_id in experiment_ids:
        replay, truth = (by_stem.get(experiment_id + suffix) for suffix in ("", GROUND_TRUTH_SUFFIX))
        if replay is None or truth is None:
            raise InputError(
                f"Of {experiment_id} only {(replay or truth)} was given: its requests need both "
                f"`{experiment_id}.json` and `{experiment_id}{GROUND_TRUTH_SUFFIX}.json`."
            )
        tables.append(_join_one(experiment_id, replay, truth))
    if not tables:
        raise InputError("No request files were given: pass both files of at least one experiment.")
    return pd.concat(tables, ignore_index=True)


def _join_one(experiment_id: str, replay: Path, truth: Path) -> pd.DataFrame:
    sent, seen = _records(replay, REPLAY_KEYS), _records(truth, TRUTH_KEYS)
    unmatched = set(sent[INDEX_KEY]) ^ set(seen[INDEX_KEY])
    if unmatched or len(sent) != len(seen):
        examples = ", ".join(map(str, sorted(unmatched)[:3])) or "a repeated one"
        raise InputError(
            f"{truth} does not match {replay.name}: {len(seen)} and {len(sent)} requests, `{INDEX_KEY}` differs at "
            f"{examples}. Fetch both at the same commit."
        )
    joined = sent.merge(seen, on=INDEX_KEY).sort_values(INDEX_KEY)
    joined = joined.rename(columns={"input_tokens": "prompt_tokens"}).assign(experiment_id=experiment_id)
    return validate_requests(joined, source=f"{replay.name} and {truth.name}")


def _records(path: Path, keys: tuple[str, ...]) -> pd.DataFrame:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable JSON file: {error}. Fetch it again.") from error
    records = document
    if isinstance(document, dict):
        lists = {key: value for key, value in document.items() if _is_record_list(value)}
        if len(lists) != 1:
            raise _other_layout(path, keys, document)
        (records,) = lists.values()
    if not _is_record_list(records):
        raise _other_layout(path, keys, document)
    wanted = (INDEX_KEY, *keys)
    for record in records:
        if not set(wanted) <= set(record):
            raise _other_layout(path, keys, record)
    return pd.DataFrame([{key: record[key] for key in wanted} for record in records])


def _is_record_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(record, dict) for record in value)


def _other_layout(path: Path, keys: tuple[str, ...], found: Any) -> InputError:
    names = ", ".join(f"`{key}`" for key in found) if isinstance(found, dict) else f"a {type(found).__name__}"
    return InputError(
        f"{path}: expected one list of records with {', '.join((INDEX_KEY, *keys))}, found {names}. This layout was "
        "never seen by stepcal: use the joined `requests/requests.parquet`, or report the keys above."
    )
