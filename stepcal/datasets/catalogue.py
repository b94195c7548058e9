"""Where measured traces are found: a local folder, the download cache, or the public files at their pinned commits.

Traces are not shipped. ``load_steps``, ``load_requests`` and ``load_xgboost_predictions`` look into the folder that
`data` or the variable ``STEPCAL_DATA`` names, then into the cache of earlier downloads, and download only when told to.
What they return is checked against the pinned SHA-256, so it is the same table on every machine.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from stepcal.datasets.facts import experiments, joined_tables, public_files
from stepcal.datasets.readers import read_requests_parquet, read_steps_parquet
from stepcal.datasets.request_join import REPLAY_FOLDER, join_requests
from stepcal.datasets.schemas import PREDICTION_SCHEMA
from stepcal.datasets.tables import checked_table, content_sha256
from stepcal.errors import InputError, MissingDataError
from stepcal.locations import cache_folder
from stepcal.units import BYTES_PER_MB

with warnings.catch_warnings():
    # pooch imports tqdm's notebook bar, which complains in a kernel without widgets; no bar is drawn there.
    warnings.simplefilter("ignore")
    import pooch

DATA_VARIABLE = "STEPCAL_DATA"
"""Environment variable that names the folder of traces."""

STEPS_FILE = "steps/enriched_steps.parquet"
PREDICTIONS_FILE = "steps/xgboost_test_predictions.csv"
REQUESTS_FILE = "requests/requests.parquet"

_STEPS_PUBLIC_NAME = "enriched_steps.parquet"
_PREDICTIONS_PUBLIC_NAME = "predictions.csv"
_RAW_FILES = "https://raw.githubusercontent.com"


@dataclass(frozen=True)
class PublicFile:
    """A file of a public repository at a pinned commit."""

    repository: str
    commit: str
    path: str
    sha256: str
    bytes: int

    @property
    def url(self) -> str:
        """Where the file can be downloaded."""
        return f"{_RAW_FILES}/{self.repository}/{self.commit}/{self.path}"

    @property
    def cached(self) -> Path:
        """Where a downloaded copy lies, whether or not it is there."""
        return cache_folder() / self.commit / Path(self.path).name


def load_steps(data: Path | str | None = None, *, download: bool = False) -> pd.DataFrame:
    """Return the public step traces of three experiments as canonical step rows.

    Parameters
    ----------
    data : Path or str, optional
        Folder laid out as ``data/README.md`` says; defaults to the variable ``STEPCAL_DATA``.
    download : bool
        Whether the public file may be downloaded into the cache when no copy is found.

    Returns
    -------
    DataFrame
        20,112 rows sorted by experiment_id and step_id; `model` holds canonical names.

    Raises
    ------
    MissingDataError
        If no copy is found (or the download fails); the message says what to do.
    InputError
        If a copy's SHA-256 is not the pinned one.
    """
    file = _unchanged_copy("step traces", STEPS_FILE, _STEPS_PUBLIC_NAME, data, download)
    steps = _with_canonical_model(read_steps_parquet(file))
    return steps.sort_values(["experiment_id", "step_id"], ignore_index=True)


def load_xgboost_predictions(data: Path | str | None = None, *, download: bool = False) -> pd.DataFrame:
    """Return the study's published per-step predictions on the temporal test split of all 16 experiments.

    Parameters
    ----------
    data : Path or str, optional
        As for `load_steps`.
    download : bool
        As for `load_steps`.

    Returns
    -------
    DataFrame
        24,550 rows sorted by experiment_id and step_id: those two, model, workload, duration_us, predicted_us.

    Raises
    ------
    MissingDataError, InputError
        As for `load_steps`.
    """
    file = _unchanged_copy("XGBoost test predictions", PREDICTIONS_FILE, _PREDICTIONS_PUBLIC_NAME, data, download)
    raw = pd.read_csv(file).rename(columns={"step.id": "step_id", "step.duration_us": "duration_us"})
    table = checked_table(raw.drop(columns="model_type"), PREDICTION_SCHEMA, source=str(file))
    return _with_canonical_model(table).sort_values(["experiment_id", "step_id"], ignore_index=True)


def load_requests(data: Path | str | None = None, *, download: bool = False) -> pd.DataFrame:
    """Return every request of the 16 experiments as canonical request rows.

    Parameters
    ----------
    data : Path or str, optional
        As for `load_steps`.
    download : bool
        Whether the 32 public files behind the table may be downloaded and joined when no copy is found. Their layout
        was never seen (unverified format): the join accepts the most plausible one and refuses any other.

    Returns
    -------
    DataFrame
        151,200 rows sorted by experiment_id and index.

    Raises
    ------
    MissingDataError
        If neither the table nor the files behind it are found (or the download fails).
    InputError
        If the table's content is not the pinned one.
    """
    local = _local(REQUESTS_FILE, data)
    if local is not None:
        requests, source = read_requests_parquet(local), str(local)
    else:
        files = _present_or_downloaded("request table", REQUESTS_FILE, _request_files(), data, download)
        requests, source = join_requests(files), f"{files[0].parent} (joined)"
    requests = requests.sort_values(["experiment_id", "index"], ignore_index=True)
    expected = str(joined_tables().set_index("table")["content_sha256"]["requests"])
    actual = content_sha256(requests)
    if actual != expected:
        raise InputError(
            f"{source}: the content of the request table has SHA-256 {actual}, but {expected} is pinned "
            "(catalogue/joined_tables.csv). The file was changed: fetch it again, or read your own requests with "
            "`read_requests_parquet`."
        )
    return requests


def have_traces(data: Path | str | None = None) -> bool:
    """Say whether steps, predictions and requests can all be loaded without a download (hashes are not checked)."""
    try:
        local = [_local(name, data) is not None for name in (STEPS_FILE, PREDICTIONS_FILE, REQUESTS_FILE)]
    except MissingDataError:
        local = [False, False, False]
    behind = [[_public(_STEPS_PUBLIC_NAME)], [_public(_PREDICTIONS_PUBLIC_NAME)], _request_files()]
    return all(
        found or all(file.cached.is_file() for file in files) for found, files in zip(local, behind, strict=True)
    )


def trace_files(data: Path | str | None = None) -> list[Path]:
    """Return the files that the loaders of this module would read, those of them that are there."""
    found = []
    for name, public in (
        (STEPS_FILE, [_public(_STEPS_PUBLIC_NAME)]),
        (PREDICTIONS_FILE, [_public(_PREDICTIONS_PUBLIC_NAME)]),
        (REQUESTS_FILE, _request_files()),
    ):
        local = _local(name, data)
        found += [local] if local is not None else [file.cached for file in public if file.cached.is_file()]
    return found


def traces_folder(data: Path | str | None = None) -> Path | None:
    """Return the folder that `data` or ``STEPCAL_DATA`` names, or None where neither is given.

    Raises
    ------
    MissingDataError
        If the folder named does not exist.
    """
    named = data if data is not None else os.environ.get(DATA_VARIABLE) or None
    if named is None:
        return None
    folder = Path(named)
    if not folder.is_dir():
        origin = "`data`" if data is not None else DATA_VARIABLE
        raise MissingDataError(
            f"{origin} names {folder}, which is not a folder. Give the folder that holds the traces."
        )
    return folder


def _with_canonical_model(table: pd.DataFrame) -> pd.DataFrame:
    models = experiments().set_index("experiment_id")["model"]
    return table.assign(model=table["experiment_id"].map(models).astype("str"))


def _local(name: str, data: Path | str | None) -> Path | None:
    folder = traces_folder(data)
    return folder / name if folder is not None and (folder / name).is_file() else None


def _unchanged_copy(what: str, name: str, public_name: str, data: Path | str | None, download: bool) -> Path:
    public = _public(public_name)
    file = _local(name, data) or _present_or_downloaded(what, name, [public], data, download)[0]
    actual = hashlib.sha256(file.read_bytes()).hexdigest()
    if actual != public.sha256:
        raise InputError(
            f"{file} has SHA-256 {actual}, but {public.sha256} is pinned for {public.repository} at "
            f"{public.commit[:7]} (catalogue/public_files.csv). The file was changed or cut short: delete it and fetch "
            "it again; your own traces are read with `read_steps`."
        )
    return file


def _present_or_downloaded(
    what: str, name: str, files: list[PublicFile], data: Path | str | None, download: bool
) -> list[Path]:
    absent = [file for file in files if not file.cached.is_file()]
    if absent and not download:
        raise MissingDataError(_not_found(what, name, absent, data))
    for file in absent:
        _download(file, what, [other for other in absent if not other.cached.is_file()])
    return [file.cached for file in files]


def _download(file: PublicFile, what: str, absent: list[PublicFile]) -> None:
    try:
        pooch.retrieve(file.url, known_hash=f"sha256:{file.sha256}", fname=file.cached.name, path=file.cached.parent)
    except ValueError as error:
        raise InputError(
            f"{file.url} was downloaded and discarded: {error} Nothing was kept; try again, and if it stays so the "
            "public file has changed."
        ) from error
    except OSError as error:
        raise MissingDataError(
            f"The {what} could not be downloaded ({type(error).__name__} at {file.url}). Still missing: "
            f"{_listing(absent)}. Two ways out: try again with a network, or set {DATA_VARIABLE} to a folder that has "
            "them."
        ) from error


def _not_found(what: str, name: str, absent: list[PublicFile], data: Path | str | None) -> str:
    folder = traces_folder(data)
    looked = f"{folder} holds no `{name}`" if folder else f"{DATA_VARIABLE} is not set"
    return (
        f"No copy of the {what} was found: {looked}, and the cache {cache_folder()} lacks {_listing(absent)}. "
        f"Two ways out: set {DATA_VARIABLE} (or `data`) to a folder with `{name}`, or fetch it from "
        f"github.com/{absent[0].repository} (`stepcal download`, or `download=True`)."
    )


def _listing(files: list[PublicFile]) -> str:
    shown = ", ".join(Path(file.path).name for file in files[:3])
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return f"{shown}{more} ({sum(file.bytes for file in files) / BYTES_PER_MB:.1f} MB)"


def _all_public() -> list[PublicFile]:
    return [PublicFile(**{str(name): value for name, value in row.items()}) for _, row in public_files().iterrows()]


def _public(name: str) -> PublicFile:
    return next(file for file in _all_public() if Path(file.path).name == name)


def _request_files() -> list[PublicFile]:
    return [file for file in _all_public() if Path(file.path).parent.name == REPLAY_FOLDER]
