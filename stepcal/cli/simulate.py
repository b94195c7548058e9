"""What ``stepcal simulate`` does: read model, server, workload and coefficients, run, and write the results whole."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stepcal.cli.output import aligned
from stepcal.cli.served_load import LoadOptions, served_load, with_rejected
from stepcal.errors import InputError
from stepcal.experiments.sampling_defaults import sampling_of
from stepcal.files import refuse_unwritable, write_bytes_atomically
from stepcal.simulator import ServerConfig, SimulationResult
from stepcal.simulator.versions import version_note
from stepcal.specs.architecture import ModelArchitecture, resolve_architecture
from stepcal.specs.deployment import Deployment
from stepcal.specs.hardware import Accelerator, resolve_accelerator
from stepcal.specs.kv_cache import AUTO, KvCache, block_size_of, kv_precision_of
from stepcal.specs.kv_offloading import offload_blocks, offloading_notes
from stepcal.specs.sampling import Sampling, read_sampling
from stepcal.step_time.coefficients import load_coefficients
from stepcal.step_time.serve import simulate

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    """The options of ``stepcal simulate``; see its ``--help``."""

    architecture: str
    accelerator: str
    tensor_parallel: int
    server: ServerConfig
    kv_offloading_gib: float
    load: LoadOptions
    coefficients: str
    seed: int
    api_before_us: float | None
    api_after_us: float | None
    steps: Path | None
    steps_fraction: float
    sampling: Path | None = None
    kv_cache_dtype: str = AUTO
    is_block_size_given: bool = True


def run_simulation(options: SimulateOptions, on_progress: Progress | None = None) -> dict[str, Any]:
    """Simulate, and write the step table where one was asked for.

    Returns
    -------
    dict
        The summary in the JSON shape of ``stepcal simulate``, with `notes` where there is something to know.

    Raises
    ------
    InputError
        If any option cannot be used; nothing is written then.
    """
    if options.steps is not None:
        refuse_unwritable(options.steps)
    architecture = resolve_architecture(options.architecture, max_model_len=options.server.max_model_len)
    architecture.check_max_model_len(options.server.max_model_len)
    accelerator = resolve_accelerator(options.accelerator)
    server, of_cache = _with_cache(options, architecture, accelerator)
    coefficients = load_coefficients(options.coefficients)
    if options.load.experiment is not None:
        coefficients = coefficients.of_experiment(options.load.experiment)
    sampling, sampled = _sampling(options, architecture)
    deployment = Deployment(
        architecture, accelerator, options.tensor_parallel, server, sampling, options.kv_cache_dtype
    )
    load = served_load(options.load, deployment.limits)
    result = simulate(
        load.requests,
        deployment,
        coefficients,
        clients=load.clients,
        timeout_s=load.timeout_s,
        api_before_us=options.api_before_us,
        api_after_us=options.api_after_us,
        record_steps=options.steps_fraction if options.steps else None,
        seed=options.seed,
        experiment_id=load.name,
        on_progress=on_progress,
    )
    if options.steps:
        _write_steps(result, options, architecture, load.name)
    version = version_note(server.vllm_version)
    notes = [*([] if version is None else [version]), *architecture.notes, *of_cache, *sampled]
    notes += [*coefficients.notes(deployment), *load.notes_on(result)]
    return {**with_rejected(result.summary(), load.rejected), **({"notes": notes} if notes else {})}


def _with_cache(
    options: SimulateOptions, architecture: ModelArchitecture, accelerator: Accelerator
) -> tuple[ServerConfig, list[str]]:
    """The server with the blocks that its backend reads and its pool in CPU memory, and notes."""
    server, precision = options.server, kv_precision_of(options.kv_cache_dtype, architecture)
    given = server.block_size if options.is_block_size_given else None
    size, notes = block_size_of(given, architecture, accelerator, server.vllm_version, precision)
    windows = architecture.windows_of(server.vllm_version)
    if windows is not None:
        is_off = server.disable_hybrid_kv_cache_manager
        if is_off is None:
            is_off = options.kv_offloading_gib > 0 and server.release.drops_groups_with_connector
        windows = windows.in_cache(is_hybrid_cache_off=is_off)
    cache = KvCache(architecture, windows, options.tensor_parallel, size, precision, server.vllm_version)
    pool = offload_blocks(architecture, options.kv_offloading_gib, block_size=size, cache=cache)
    server = replace(server, block_size=size, offload_blocks=pool)
    return server, [*notes, *offloading_notes(server)]


def _sampling(options: SimulateOptions, architecture: ModelArchitecture) -> tuple[Sampling, list[str]]:
    """The sampling parameters that were asked for, or those beside the model's config, or its publisher's, with notes."""
    if options.sampling is not None:
        return read_sampling(options.sampling), []
    config = Path(options.architecture) if options.architecture.endswith(".json") else None
    return sampling_of({}, config, (options.architecture, architecture.name), vocab_size=architecture.vocab_size)


def summary_text(summary: dict[str, Any]) -> str:
    """Return a simulation's summary as a table for a terminal."""
    parts = {"overall": summary["overall"]}
    if len(summary["stages"]) > 1:
        parts |= {f"stage {i}": stage for i, stage in enumerate(summary["stages"])}
    counts = [["", "requests", "completed", "failed", "requests/s"]]
    for name, part in parts.items():
        rate = "-" if part["requests_per_s"] is None else f"{part['requests_per_s']:,.2f}"
        counts.append([name, *(f"{part[key]:,}" for key in ("requests", "completed", "failed")), rate])
    latencies = [["ms", "", "mean", "p50", "p90", "p99"]]
    for name, part in parts.items():
        for metric in ("e2e_ms", "ttft_ms", "tpot_ms", "itl_ms"):
            cells = ["-" if value is None else f"{value:,.2f}" for value in part[metric].values()]
            latencies.append([name, metric.removesuffix("_ms"), *cells])
    lines = [*aligned(counts), *aligned(latencies, n_left=2)]
    lines.append(
        f"{summary['steps']:,} steps, {summary['preemptions']:,} preemptions, {summary['simulated_s']:,.1f} s simulated in "
        f"{summary['wall_s']:.2f} s"
    )
    lines += [f"Note: {note}" for note in summary.get("notes", ())]
    return "\n".join(lines)


def _write_steps(
    result: SimulationResult, options: SimulateOptions, architecture: ModelArchitecture, name: str
) -> None:
    """Write the step table with the columns that a real trace has."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = result.step_table()
    if not table.num_rows:
        raise InputError(
            f"None of the {result.steps:,} steps is in the sample, so there is no {options.steps} to write. Raise "
            f"`--steps-fraction` ({options.steps_fraction}) or leave `--steps` out."
        )
    for column, value in (
        ("model", architecture.name),
        ("workload", name),
        ("tensor_parallel", options.tensor_parallel),
    ):
        table = table.append_column(column, pa.array([value] * table.num_rows))
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    if options.steps is not None:
        write_bytes_atomically(options.steps, buffer.getvalue())
