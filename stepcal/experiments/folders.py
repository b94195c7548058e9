"""Reads experiments of one's own: a folder for each run, laid out as the public ones.

``<folder>/<id>/exp-config.yaml`` names model and server limits, ``results/config.yaml`` (as run) or ``profile.yaml`` (as
asked for) the workload, ``results/*_lifecycle_metrics.json`` what clients measured, and a ``config.json`` the architecture
of a model that does not ship. Runs and results may lie deeper. Arrivals are those that were measured where a run has
``per_request_lifecycle_metrics.json`` or rows in a ``requests.parquet``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from stepcal.datasets import experiments as experiments_table
from stepcal.datasets import read_lifecycle_per_request, read_lifecycle_summary, read_requests_parquet
from stepcal.datasets.facts import OVERLOADED_BELOW_SHARE
from stepcal.datasets.lifecycle import WHOLE_RUN
from stepcal.documents import read_yaml
from stepcal.errors import InputError, NotModelledError
from stepcal.experiments.engine_args import (
    CONFIG_NAMES,
    KV_BLOCK_KEYS,
    MODEL_KEYS,
    Settings,
    accelerator_of,
    kv_cache_dtype_of,
    read_settings,
    served_architecture,
    server_of,
    settings_as_written,
    tensor_parallel_of,
)
from stepcal.experiments.experiment import CLIENT_TIMEOUT_S, Experiment
from stepcal.experiments.latencies import WHOLE, measured_latencies, summary_latencies
from stepcal.experiments.sampling_defaults import sampling_of
from stepcal.simulator import Workload, read_workload
from stepcal.specs.architecture import ModelArchitecture, load_architecture, resolve_architecture
from stepcal.specs.deployment import Deployment

Case = tuple[Experiment, pd.DataFrame]

SERVER_SETTINGS = ("server_settings.csv", "../requests/server_settings.csv")
REQUEST_TABLES = ("requests.parquet", "../requests/requests.parquet")
PER_REQUEST = "per_request_lifecycle_metrics.json"
SUMMARY = "summary_lifecycle_metrics.json"
MISSING_REQUESTS_SHARE = 0.01
"""Share of the requests by which the summary and a table of requests may differ."""

GROWN_FACTOR = 1.5
"""Median prompts longer than so many first turns are taken for conversations that grew."""
OUTPUT_FACTOR = 1.5
"""By how much the measured length of answers may differ from the one asked for without a note: text is tokenised anew."""


@dataclass(frozen=True)
class RefusedRun:
    """A run that asks for what the simulator does not model.

    Attributes
    ----------
    experiment_id, reason : str
    accelerator : str
        Name of its GPU.
    """

    experiment_id: str
    accelerator: str
    reason: str


def read_experiment_folder(
    folder: Path, *, accelerator: str | None = None, kv_offloading_gib: float | None = None
) -> list[Case]:
    """Read every run of a folder, with its measured summaries.

    Parameters
    ----------
    folder : Path
        Holds a folder for each run, or is one.
    accelerator : str, optional
        GPU of runs whose ``exp-config.yaml`` does not name one (`gpu`); by default the one in the run's name, else H100 SXM.
    kv_offloading_gib : float, optional
        Size of the offload pool of runs whose ``exp-config.yaml`` does not say (`kv_offloading_size`); by default that
        of ``data/experiments.csv`` for the runs that it lists, and none for others.

    Returns
    -------
    list of (Experiment, DataFrame)
        The second is what clients measured, as `stepcal.experiments.latencies.latency_table` gives it. What was
        assumed of a run is in its `notes`; measured arrivals, where there are any, in its `requests`.

    Raises
    ------
    InputError
        If the folder holds no run, or a run lacks a file or a setting; the message names it.
    """
    runs = _runs(folder)
    shared = _shared_requests(folder, runs)
    return [_read_run(run, folder, accelerator, kv_offloading_gib, shared) for run in runs]


def read_usable_runs(
    folder: Path, *, accelerator: str | None = None, kv_offloading_gib: float | None = None
) -> tuple[list[Case], dict[str, str]]:
    """Read a folder as `read_experiment_folder` does, so that one bad run does not hide the others.

    Returns
    -------
    cases : list of (Experiment, DataFrame)
    bad : dict of str to str
        Why a run cannot be used, by its name.

    Raises
    ------
    InputError
        If the folder holds no run, or none that can be used.
    """
    bad: dict[str, str] = {}
    cases = []
    runs = _runs(folder, bad)
    shared = _shared_requests(folder, runs)
    for run in runs:
        try:
            cases.append(_read_run(run, folder, accelerator, kv_offloading_gib, shared))
        except InputError as error:
            bad[_name(run)] = str(error)
    if not cases:
        few = 5
        reasons = [f"{name}: {reason}" for name, reason in list(bad.items())[:few]]
        more = f" And {len(bad) - few} more." if len(bad) > few else ""
        raise InputError("\n".join(reasons) + more)
    return cases, bad


def read_supported_runs(
    folder: Path, *, accelerator: str | None = None, kv_offloading_gib: float | None = None
) -> tuple[list[Case], list[RefusedRun]]:
    """Read a folder as `read_experiment_folder` does, and list what the simulator refuses by name instead of failing.

    Raises
    ------
    InputError
        If the folder holds no run, or a run lacks a file or a setting: a slip is no refusal.
    """
    cases, refused = [], []
    runs = _runs(folder)
    shared = _shared_requests(folder, runs)
    for run in runs:
        try:
            cases.append(_read_run(run, folder, accelerator, kv_offloading_gib, shared))
        except NotModelledError as error:
            gpu = accelerator_of(settings_as_written(run), accelerator)[0]
            refused.append(RefusedRun(_name(run), gpu.name, str(error)))
    return cases, refused


def _name(run: Path) -> str:
    return run.resolve().name


def _runs(folder: Path, bad: dict[str, str] | None = None) -> list[Path]:
    """Folders with a run; what only looks like one goes into `bad`, and without that raises."""

    def refuse(run: Path, reason: str) -> None:
        if bad is None:
            raise InputError(reason)
        bad[str(run.relative_to(folder))] = reason

    runs = sorted({path.parent for name in CONFIG_NAMES for path in folder.rglob(name)}) if folder.is_dir() else []
    if not runs:
        raise InputError(
            f"{folder} holds no experiments. It needs a folder for each run, with `exp-config.yaml`, `profile.yaml` and "
            "`results/*_lifecycle_metrics.json`."
        )
    first: dict[str, Path] = {}
    for run in runs:
        other = first.setdefault(_name(run), run)
        if other != run:
            refuse(run, f"{other} and {run} are runs of one name. Rename one of the folders: runs go by their names.")
    for other in (p for p in sorted(folder.iterdir()) if p.is_dir() and folder not in runs):
        has_run = any(run.is_relative_to(other) for run in runs)
        if not has_run and ((other / "profile.yaml").is_file() or any(other.rglob(f"*{SUMMARY}"))):
            refuse(
                other,
                f"{other} lacks `{CONFIG_NAMES[0]}`, which names the model and the server's limits. Add it, or move the "
                f"folder out of {folder} if it is no run.",
            )
    return list(first.values())


def _read_run(
    run: Path,
    folder: Path,
    accelerator: str | None,
    kv_offloading_gib: float | None,
    shared: dict[Path, pd.DataFrame],
) -> Case:
    settings = read_settings(run)
    measured, results = _measured(run)
    places = (results / "config.yaml", run / "results" / "config.yaml", run / "profile.yaml", run / "profile.yml")
    source = next((place for place in places if place.is_file()), None)
    if source is None:
        raise InputError(
            f"{run} has neither `results/config.yaml` nor `profile.yaml`: the workload is unknown. Add the profile that "
            "the load generator was started with."
        )
    workload = _workload(source)
    gpu, notes = accelerator_of(settings, accelerator)
    degree, more = tensor_parallel_of(settings)
    architecture, as_served = served_architecture(settings, _architecture(run, settings))
    architecture.check_tensor_parallel(degree)
    notes = [*settings.notes, *architecture.notes, *as_served, *notes]
    if kv_offloading_gib is None:
        kv_offloading_gib = _listed_offloading_gib(_name(run))
    kv_blocks = None if settings.find(KV_BLOCK_KEYS) else _listed_kv_blocks(run, folder)
    server, assumed = server_of(
        settings, architecture, gpu, tensor_parallel=degree, kv_blocks=kv_blocks, kv_offloading_gib=kv_offloading_gib
    )
    names = (str((settings.find(MODEL_KEYS) or ("", ""))[1]), architecture.name, _name(run))
    sampling, sampled = sampling_of(settings.values, run / "config.json", names, vocab_size=architecture.vocab_size)
    requests, about = _requests(run, shared, measured)
    if requests is None:
        workload, prompts = _measured_lengths(workload, measured)
        about = [*about, *prompts]
    experiment = Experiment(
        experiment_id=_name(run),
        deployment=Deployment(architecture, gpu, degree, server, sampling, kv_cache_dtype_of(settings)),
        workload=workload,
        overloaded=False,
        requests=requests,
        notes=(*notes, *more, *assumed, *sampled, *about),
    )
    if measured.empty and requests is None:
        raise InputError(
            f"{run / 'results'} lacks `{SUMMARY}`, the figures of the whole run, and there is no `{PER_REQUEST}` either: "
            "there is nothing to compare with. Copy what the load generator wrote into it."
        )
    known = measured_latencies(experiment) if measured.empty else summary_latencies(measured, workload.output_len)
    overloaded = _is_overloaded(_served_per_s(measured, known), workload)
    return replace(experiment, overloaded=overloaded), known


def _listed_offloading_gib(name: str) -> float | None:
    """Size of the offload pool of a run that ships in ``data/experiments.csv``; None of any other."""
    shipped = experiments_table()
    own = shipped.loc[shipped["experiment_id"] == name, "kv_offloading_gib"]
    return float(own.iloc[0]) if len(own) else None


def _workload(source: Path) -> Workload:
    document = read_yaml(source, what="workload of inference-perf")
    try:
        workload = read_workload(document)
    except InputError as error:
        raise type(error)(f"{source}: {error}") from None
    return replace(workload, timeout_s=min(workload.timeout_s, CLIENT_TIMEOUT_S))


def _measured(run: Path) -> tuple[pd.DataFrame, Path]:
    """Summaries of a run (none: an empty table), and the folder they lie in."""
    summary = _only(run.rglob(f"*{SUMMARY}"), run)
    results = run / "results" if summary is None else summary.parent
    stages = sorted(results.glob("*stage_*_lifecycle_metrics.json"))
    if summary is None:
        return pd.DataFrame(columns=["stage", "metric", "statistic", "value"]), results
    return pd.concat([read_lifecycle_summary(file) for file in (summary, *stages)]), results


def _measured_lengths(workload: Workload, measured: pd.DataFrame) -> tuple[Workload, list[str]]:
    """The workload with prompts as long as the summary says, which generated arrivals would not know, and notes."""
    prompt, output = _median(measured, "prompt_len"), _median(measured, "output_len")
    notes = []
    if output is not None and not workload.output_len / OUTPUT_FACTOR <= output <= workload.output_len * OUTPUT_FACTOR:
        notes.append(
            f"Answers have {output:,.0f} tokens as measured (median); {workload.output_len:,} were asked for, and are "
            "simulated."
        )
    if prompt is None:
        return workload, notes
    if workload.multi_turn_chat:
        if prompt > GROWN_FACTOR * workload.prompt_len:
            return workload, notes
        workload = replace(workload, multi_turn_chat=False)
        notes.append("`enable_multi_turn_chat` was asked for, but the measured prompts do not grow: single turns.")
    longer = workload.with_prompt_len(prompt)
    if longer != workload:
        notes.append(f"Prompts have {longer.prompt_len} tokens, as measured; {workload.prompt_len} were asked for.")
    return longer, notes


def _median(measured: pd.DataFrame, metric: str) -> float | None:
    """Median of a length over the whole run, None where the summary does not say."""
    rows = measured[(measured["metric"] == metric) & (measured["statistic"] == "p50")]
    whole = rows.loc[rows["stage"] == WHOLE_RUN, "value"]
    return float(whole.iloc[0]) if len(whole) else None


def _only(files: Iterable[Path], run: Path) -> Path | None:
    """The file that lies highest, None if there is none."""
    found = sorted(files, key=lambda path: (len(path.parts), path))
    if len(found) > 1 and len(found[0].parts) == len(found[1].parts):
        places = " and ".join(str(path.relative_to(run)) for path in found[:2])
        raise InputError(
            f"{run} has {places}: it is not clear which is its own. A folder holds one run; move one away."
        )
    return found[0] if found else None


def _served_per_s(measured: pd.DataFrame, known: pd.DataFrame) -> dict[int, float]:
    """Requests completed per second by stage, and of the whole run."""
    if measured.empty:
        value = known[(known["split"] == WHOLE) & (known["metric"] == "throughput")]["value"]
        return {WHOLE_RUN: float(value.iloc[0]) if len(value) else 0.0}
    served = measured[(measured["metric"] == "throughput") & (measured["statistic"] == "requests")]
    nothing = measured[(measured["metric"] == "requests") & (measured["statistic"] == "completed")].query("value == 0")
    return {**dict(zip(served["stage"], served["value"], strict=True)), **dict.fromkeys(nothing["stage"], 0.0)}


def _is_overloaded(by_stage: dict[int, float], workload: Workload) -> bool:
    """Whether any stage, or the run if stages have no figures, was served more slowly than it was asked for."""
    shares = [by_stage[i] / stage.rate for i, stage in enumerate(workload.stages) if i in by_stage]
    if not shares and WHOLE_RUN in by_stage:
        asked = sum(s.n_requests for s in workload.stages) / sum(s.duration_s for s in workload.stages)
        shares = [by_stage[WHOLE_RUN] / asked] if asked else []
    return bool(shares and min(shares) < OVERLOADED_BELOW_SHARE)


def _shared_requests(folder: Path, runs: list[Path]) -> dict[Path, pd.DataFrame]:
    """Tables with the requests of several runs, by their files."""
    places = dict.fromkeys((folder, *(run.parent for run in runs)))
    files = [place / name for place in places for name in REQUEST_TABLES]
    return {file: read_requests_parquet(file) for file in files if file.is_file()}


def _requests(
    run: Path, shared: dict[Path, pd.DataFrame], measured: pd.DataFrame
) -> tuple[pd.DataFrame | None, list[str]]:
    """Measured requests of a run in order of arrival, None where there are none, and notes."""
    name = _name(run)
    file = _only(run.rglob(f"*{PER_REQUEST}"), run)
    own = None if file is not None else _only(run.rglob(REQUEST_TABLES[0]), run)
    if file is not None:
        table = read_lifecycle_per_request(file, experiment_id=name)
    elif own is not None:
        table, file = read_requests_parquet(own), own
        if table["experiment_id"].nunique() > 1:
            table = table[table["experiment_id"] == name]
            if table.empty:
                raise InputError(
                    f"{own} holds several experiments, but no row of `{name}`. Name its rows so, or drop the file."
                )
    else:
        found = [(f, t[t["experiment_id"] == name]) for f, t in shared.items() if (t["experiment_id"] == name).any()]
        if not found:
            return None, []
        file, table = found[0]
    table = table.sort_values("arrival_time_us", kind="stable").reset_index(drop=True)
    asked = measured[(measured["metric"] == "requests") & (measured["statistic"] == "requested")]
    counted = asked.loc[asked["stage"] == WHOLE_RUN, "value"]
    if counted.empty or int(counted.iloc[0]) == len(table):
        return table, []
    differ = f"{file} holds {len(table):,} requests, the summary of `{name}` counts {int(counted.iloc[0]):,}"
    if abs(len(table) - counted.iloc[0]) > MISSING_REQUESTS_SHARE * counted.iloc[0]:
        raise InputError(
            f"{differ}: it is cut short, or of another run. Copy it again, or take it away to simulate Poisson arrivals."
        )
    return table, [f"{differ}."]


def _architecture(run: Path, settings: Settings) -> ModelArchitecture:
    own = run / "config.json"
    if own.is_file():
        return resolve_architecture(str(own), max_model_len=settings.whole("max_model_len"))
    found = settings.find(MODEL_KEYS)
    if found is None:
        raise InputError(
            f"{settings.path} lacks `model`, and there is no `config.json` beside it. Add the model's HuggingFace "
            "`config.json`."
        )
    model = str(found[1])
    for name in (model, model.lower(), model.rpartition("/")[2].lower()):
        try:
            return load_architecture(name)
        except InputError:
            continue
    raise InputError(
        f"{run}: the model `{model}` does not ship. Put its HuggingFace `config.json` into the run's folder."
    )


def _listed_kv_blocks(run: Path, folder: Path) -> int | None:
    """KV blocks that a table beside the runs lists for a run."""
    for name in SERVER_SETTINGS:
        for place in dict.fromkeys((folder, run.parent)):
            if (place / name).is_file():
                table = _settings_table(place / name)
                if _name(run) in table.index:
                    return int(table[_name(run)])
    return None


def _settings_table(file: Path) -> pd.Series:
    """KV blocks by experiment."""
    try:
        table = pd.read_csv(file, dtype={"experiment_id": str}).set_index("experiment_id")
        return table[KV_BLOCK_KEYS[0]].astype(int)
    except (OSError, KeyError, ValueError) as error:
        raise InputError(
            f"{file} cannot be read ({type(error).__name__}: {error}). It is a CSV table with the columns `experiment_id` "
            f"and `{KV_BLOCK_KEYS[0]}`."
        ) from None
