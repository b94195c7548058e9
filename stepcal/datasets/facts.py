"""Loaders of the tables that ship in ``data/``: experiments, measured figures, and published results.

Each table is checked against its schema once a process and then served as a copy, so a caller may change what it gets.
`python -m stepcal.datasets.build` writes the files.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pandas as pd
import pandera.pandas as pa

from stepcal.datasets import fact_schemas, transfer_schemas
from stepcal.datasets.tables import checked_table, column_dictionary
from stepcal.errors import InputError, MissingDataError
from stepcal.locations import data_folder

TABLES: dict[str, pa.DataFrameSchema] = {
    "architectures.csv": fact_schemas.ARCHITECTURES,
    "experiments.csv": fact_schemas.EXPERIMENTS,
    "load_stages.csv": fact_schemas.LOAD_STAGES,
    "measured.csv": fact_schemas.MEASURED,
    "published/h1_pooled.csv": fact_schemas.H1_POOLED,
    "published/h1_per_experiment.csv": fact_schemas.H1_PER_EXPERIMENT,
    "published/h2.csv": fact_schemas.H2,
    "published/xgboost.csv": fact_schemas.XGBOOST,
    "published/blis_e2e.csv": fact_schemas.BLIS,
    "published/peers.csv": fact_schemas.PEERS,
    "kernel_efficiency.csv": fact_schemas.KERNEL_EFFICIENCY,
    "catalogue/public_files.csv": fact_schemas.PUBLIC_FILES,
    "catalogue/joined_tables.csv": fact_schemas.JOINED_TABLES,
    "sources.csv": fact_schemas.SOURCES,
    "hardware/accelerators.csv": fact_schemas.ACCELERATORS,
    "hardware/silicon.csv": transfer_schemas.SILICON,
    "hardware/silicon_peer.csv": transfer_schemas.SILICON_PEER,
    "transfer/runs.csv": transfer_schemas.RUNS,
    "transfer/measured.csv": transfer_schemas.MEASURED,
    "transfer/peers.csv": transfer_schemas.PEERS,
    "transfer/sampling.csv": transfer_schemas.SAMPLING,
}
"""Every table that ships: its path below ``data/`` and its schema. The last is written by hand, the rest built."""
OVERLOADED_BELOW_SHARE = 0.95
"""Completed over requested rate below which a run is overloaded. Chosen: the runs lie above 0.99 or below 0.81."""


def experiments() -> pd.DataFrame:
    """Return the 16 experiments: server settings, workload as asked and as run, overload flag."""
    return shipped_table("experiments.csv")


def load_stages() -> pd.DataFrame:
    """Return the load stages of each experiment: requested and achieved rate, duration, requests sent."""
    return shipped_table("load_stages.csv")


def measured() -> pd.DataFrame:
    """Return the measured summary figures, one a row: experiment, stage (-1 whole run), metric, statistic, value."""
    return shipped_table("measured.csv")


def published_h1() -> pd.DataFrame:
    """Return the study's pooled correlations of FLOP components with the label."""
    return shipped_table("published/h1_pooled.csv")


def published_h1_per_experiment() -> pd.DataFrame:
    """Return the study's correlations per experiment, with the number of sampled steps."""
    return shipped_table("published/h1_per_experiment.csv")


def published_h2() -> pd.DataFrame:
    """Return the study's per-step errors of the blackbox and of the 9- and 36-parameter variants."""
    return shipped_table("published/h2.csv")


def published_xgboost() -> pd.DataFrame:
    """Return the study's gradient boosting results per experiment."""
    return shipped_table("published/xgboost.csv")


def published_blis() -> pd.DataFrame:
    """Return end-to-end predictions of three later calibration rounds of the BLIS simulator."""
    return shipped_table("published/blis_e2e.csv")


def peers() -> pd.DataFrame:
    """Return the predictions of seven public simulators beside what was measured."""
    return shipped_table("published/peers.csv")


def transfer_runs() -> pd.DataFrame:
    """Return the settings of 31 runs of other models, GPUs and precisions, that nothing here was fitted to."""
    return shipped_table("transfer/runs.csv")


def transfer_measured() -> pd.DataFrame:
    """Return what the clients of those runs measured, by load stage."""
    return shipped_table("transfer/measured.csv")


def transfer_peers() -> pd.DataFrame:
    """Return the mean E2E that public simulators predicted for those runs."""
    return shipped_table("transfer/peers.csv")


def transfer_sampling() -> pd.DataFrame:
    """Return the sampling defaults of those runs' model families, with how sure each is."""
    return shipped_table("transfer/sampling.csv")


def kernel_efficiency() -> pd.DataFrame:
    """Return what benchmarked GPU kernels reach: shares of peak rates, and the time a KV block takes beyond its bytes."""
    return shipped_table("kernel_efficiency.csv")


def public_files() -> pd.DataFrame:
    """Return the pinned public files behind the traces: repository, commit, path, SHA-256, size."""
    return shipped_table("catalogue/public_files.csv")


def joined_tables() -> pd.DataFrame:
    """Return the content hashes of tables that are joined from several public files."""
    return shipped_table("catalogue/joined_tables.csv")


def sources() -> pd.DataFrame:
    """Return where each shipped table comes from."""
    return shipped_table("sources.csv")


def table_columns(name: str) -> pd.DataFrame:
    """Return the data dictionary of a shipped table, by its path below ``data/``."""
    return column_dictionary(_schema(name))


def shipped_table(name: str) -> pd.DataFrame:
    """Return a shipped table by its path below ``data/``, checked against its schema.

    Raises
    ------
    MissingDataError
        If the file is not there.
    InputError
        If no such table ships, or the file breaks its schema.
    """
    _schema(name)
    return _checked(data_folder() / name, name).copy()


def read_table(path: Path, name: str) -> pd.DataFrame:
    """Read a CSV file as the shipped table `name`, checked against its schema."""
    if not path.is_file():
        raise MissingDataError(
            f"{path} is not there. Restore it from the repository, or run `make data` with the public layout at hand."
        )
    words = {
        name: "str" for name, kind in table_columns(name)[["column", "kind"]].itertuples(index=False) if kind == "text"
    }
    try:
        frame = pd.read_csv(path, dtype=words, keep_default_na=False, na_values=[""])
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a CSV table: {error}. Restore it from the repository.") from error
    return checked_table(frame, _schema(name), source=str(path))


@functools.cache
def _checked(path: Path, name: str) -> pd.DataFrame:
    return read_table(path, name)


def _schema(name: str) -> pa.DataFrameSchema:
    if name not in TABLES:
        raise InputError(f"No table `{name}` ships in data/. Tables: {', '.join(TABLES)}.")
    return TABLES[name]
