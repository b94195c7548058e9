"""Step and request tables from files: the study's parquet layout, our own, and whatever `read_steps` recognises.

Each reader ends in `validate_steps` or `validate_requests`. Columns that a layout is known to carry and that we do not
use are dropped here by name; any other column that the schema does not know is refused.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from stepcal.datasets.otlp import read_steps_otlp
from stepcal.datasets.schemas import validate_requests, validate_steps
from stepcal.datasets.steps_layout import IDENTITY_COLUMNS, STEP_ATTRIBUTES, UNUSED_STEP_ATTRIBUTES
from stepcal.errors import InputError

_STUDY_COLUMNS = {**STEP_ATTRIBUTES, "tp": "tensor_parallel"}
UNUSED_STUDY_COLUMNS = frozenset({"cycle_time_us", "matched_iti_count", "cycle_time_ratio"}) | UNUSED_STEP_ATTRIBUTES
"""Columns of the study's file that its reader drops: derived cycle times with a known matching fault, and sums."""

_PARQUET_MAGIC = b"PAR1"
_TEXT_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson"})


def read_steps(
    path: Path | str,
    *,
    experiment_id: str | None = None,
    model: str | None = None,
    workload: str | None = None,
    tensor_parallel: int | None = None,
    ignore: Collection[str] = (),
) -> pd.DataFrame:
    """Read a step trace, parquet or OTLP JSON-lines, whichever the file is.

    Parameters
    ----------
    path : Path or str
    experiment_id, model, workload : str, optional
        Names of the run. OTLP carries none of them, so all are needed there; in parquet they fill absent columns.
    tensor_parallel : int, optional
        As above.
    ignore : collection of str
        Columns or attributes to drop that the schema does not know.

    Returns
    -------
    DataFrame
        Canonical step rows (`step_columns`), in file order.

    Raises
    ------
    InputError
        If the file is absent, of neither format, corrupt, or breaks the schema; or if OTLP comes without the names.
    """
    path = existing_file(path)
    identity = dict(zip(IDENTITY_COLUMNS, (experiment_id, model, workload, tensor_parallel), strict=True))
    with path.open("rb") as stream:
        head = stream.read(len(_PARQUET_MAGIC))
    if head == _PARQUET_MAGIC or path.suffix == ".parquet":
        return _steps_from_parquet(path, {k: v for k, v in identity.items() if v is not None}, ignore)
    if path.suffix in _TEXT_SUFFIXES or head.startswith(b"{"):
        if experiment_id is None or model is None or workload is None or tensor_parallel is None:
            absent = ", ".join(f"`{name}`" for name, value in identity.items() if value is None)
            raise InputError(f"{path} is an OTLP trace, which does not name its run: pass {absent} too.")
        return read_steps_otlp(
            path,
            experiment_id=experiment_id,
            model=model,
            workload=workload,
            tensor_parallel=tensor_parallel,
            ignore=ignore,
        )
    raise InputError(
        f"{path} is neither parquet (starts with `PAR1`) nor OTLP JSON-lines (each line starts with `{{`). "
        "Convert it to one of the two."
    )


def read_steps_parquet(path: Path | str, *, ignore: Collection[str] = ()) -> pd.DataFrame:
    """Read step rows from parquet, in the study's layout (``step.id``, ``batch.prefill_tokens``, ...) or in ours.

    Parameters
    ----------
    path : Path or str
    ignore : collection of str
        Columns to drop that neither layout knows.

    Returns
    -------
    DataFrame
        Canonical step rows, in file order. Models keep the name that the file gives them.

    Raises
    ------
    InputError
        If the file is absent, is not readable parquet, or breaks the schema.
    """
    return _steps_from_parquet(existing_file(path), {}, ignore)


def read_requests_parquet(path: Path | str, *, ignore: Collection[str] = ()) -> pd.DataFrame:
    """Read request rows from parquet: the study's layout (``input_tokens``) or ours (``prompt_tokens``).

    Parameters
    ----------
    path : Path or str
    ignore : collection of str
        Columns to drop that neither layout knows.

    Returns
    -------
    DataFrame
        Canonical request rows, in file order.

    Raises
    ------
    InputError
        If the file is absent, is not readable parquet, or breaks the schema.
    """
    path = existing_file(path)
    frame = read_parquet_file(path).drop(columns=list(ignore), errors="ignore")
    return validate_requests(frame.rename(columns={"input_tokens": "prompt_tokens"}), source=str(path))


def existing_file(path: Path | str) -> Path:
    """Return `path` as a `Path`, or raise an `InputError` that says it is not a file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is not a file. Check the path, or list its folder {path.parent}.")
    return path


def read_parquet_file(path: Path) -> pd.DataFrame:
    """Read any parquet file, or raise an `InputError` that names it and says why it cannot be read."""
    try:
        return pq.read_table(path).to_pandas()
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, LookupError, OverflowError) as error:
        # Arrow's own, and what pandas makes of damaged metadata.
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"{path} cannot be read as parquet: {reason}. The file is corrupt or cut short: fetch or write it again."
        ) from error


def _steps_from_parquet(path: Path, identity: dict[str, str | int], ignore: Collection[str]) -> pd.DataFrame:
    frame = read_parquet_file(path).drop(columns=list(ignore), errors="ignore")
    if "step.id" in frame.columns:
        frame = frame.drop(columns=list(UNUSED_STUDY_COLUMNS), errors="ignore").rename(columns=_STUDY_COLUMNS)
    for name in identity.keys() - set(frame.columns):
        frame[name] = identity[name]
    return validate_steps(frame, source=str(path))
