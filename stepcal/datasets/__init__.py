"""Data: where traces are found, how they are read and checked, the tables of facts that ship, and invented traces."""

from stepcal.datasets.catalogue import have_traces, load_requests, load_steps, load_xgboost_predictions
from stepcal.datasets.facts import (
    experiments,
    kernel_efficiency,
    load_stages,
    measured,
    peers,
    published_blis,
    published_h1,
    published_h1_per_experiment,
    published_h2,
    published_xgboost,
    sources,
    table_columns,
    transfer_measured,
    transfer_peers,
    transfer_runs,
    transfer_sampling,
)
from stepcal.datasets.lifecycle import read_lifecycle_per_request, read_lifecycle_summary
from stepcal.datasets.otlp import read_steps_otlp
from stepcal.datasets.readers import read_requests_parquet, read_steps, read_steps_parquet
from stepcal.datasets.schemas import request_columns, step_columns, validate_requests, validate_steps
from stepcal.datasets.synthetic import simulated_step_rows
from stepcal.datasets.tables import content_sha256

__all__ = [
    "content_sha256",
    "experiments",
    "have_traces",
    "kernel_efficiency",
    "load_requests",
    "load_stages",
    "load_steps",
    "load_xgboost_predictions",
    "measured",
    "peers",
    "published_blis",
    "published_h1",
    "published_h1_per_experiment",
    "published_h2",
    "published_xgboost",
    "read_lifecycle_per_request",
    "read_lifecycle_summary",
    "read_requests_parquet",
    "read_steps",
    "read_steps_otlp",
    "read_steps_parquet",
    "request_columns",
    "simulated_step_rows",
    "sources",
    "step_columns",
    "table_columns",
    "transfer_measured",
    "transfer_peers",
    "transfer_runs",
    "transfer_sampling",
    "validate_requests",
    "validate_steps",
]
