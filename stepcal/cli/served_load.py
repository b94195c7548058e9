"""What ``stepcal simulate`` serves: requests from a workload, a table or a trace, and the clients that send them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stepcal.errors import InputError
from stepcal.simulator import (
    Clients,
    RequestList,
    ServerConfig,
    SimulationResult,
    Workload,
    read_workload,
    replay_requests,
    replay_trace,
)

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """The options of ``stepcal simulate`` that say what is sent; see its ``--help``."""

    workload: Path | None = None
    requests: Path | None = None
    format: str | None = None
    experiment: str | None = None
    arrivals: str = "poisson"
    cv: float | None = None
    first: int | None = None
    from_s: float | None = None
    until_s: float | None = None
    rate_scale: float | None = None
    concurrency: int | None = None
    max_in_flight: int | None = None
    think_s: float = 0.0
    timeout_s: float | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ServedLoad:
    """Requests, who sends them, and what the user should know of both.

    Attributes
    ----------
    requests : RequestList
    clients : Clients
    timeout_s : float
    name : str
        Of the run.
    rejected : ndarray of int, shape (n_stages,)
        Requests of each stage that the server rejects at once, because they are longer than its context limit.
    users : int
        Of a chat whose prompts grow: request ``i`` is a turn of user ``i % users``. 0 for other loads.
    notes : tuple of str
    """

    requests: RequestList
    clients: Clients
    timeout_s: float
    name: str
    rejected: np.ndarray
    users: int = 0
    notes: tuple[str, ...] = ()

    def notes_on(self, result: SimulationResult) -> list[str]:
        """Return the notes on what was sent, and one where a chat's turn went out before the answer that it carries."""
        if not self.users:
            return list(self.notes)
        place = np.arange(len(self.requests)) if self.requests.index is None else self.requests.index
        answered_us = np.full(int(place.max(initial=0)) + 1, np.inf)
        answered_us[place] = np.where(result.is_finished, result.rows["finish_us"] + result.api_after_us, np.inf)
        later = place >= self.users
        early = int((result.sent_us[later] < answered_us[place[later] - self.users]).sum())
        if not early:
            return list(self.notes)
        note = (
            f"{early:,} of {int(later.sum()):,} later turns were sent before the answer that they carry; inference-perf "
            "holds them back until it is there, so their users are slower than simulated."
        )
        return [*self.notes, note]


def served_load(options: LoadOptions, server: ServerConfig) -> ServedLoad:
    """Return what is sent to the server.

    Raises
    ------
    InputError
        If neither a workload nor a table is given, one cannot be read, or two options contradict each other.
    """
    if options.workload is None and options.requests is None:
        raise InputError(
            "Neither `--workload` nor `--requests` was given: there is nothing to serve. Give one, or both."
        )
    if options.workload is not None and not options.workload.is_file():
        raise InputError(
            f"No workload at {options.workload}. Give an inference-perf profile.yaml or results/config.yaml."
        )
    workload = None if options.workload is None else read_workload(options.workload)
    if options.requests is not None:
        requests, name, notes = _replayed(options.requests, options, workload)
        rejected = np.zeros(requests.n_stages, np.int64)
        clients = Clients()
    else:
        assert workload is not None
        _refuse_trace_options(options)
        name = _run_name(options.workload)
        generated = workload.requests(options.arrivals, cv=options.cv, seed=options.seed)
        requests, rejected, notes = _accepted(generated, workload, server)
        clients = workload.clients()
    requests, clients = _sent_by(requests, clients, options)
    timeout_s = float("inf") if workload is None else workload.timeout_s
    return ServedLoad(
        requests=requests,
        clients=clients,
        timeout_s=timeout_s if options.timeout_s is None else options.timeout_s,
        name=name,
        rejected=rejected,
        users=workload.n_prompts if workload and workload.multi_turn_chat and options.requests is None else 0,
        notes=(*notes, *_request_notes(requests, server)),
    )


def _request_notes(requests: RequestList, server: ServerConfig) -> list[str]:
    """Notes on a load without requests, and where priorities and the server's policy do not go together."""
    if not len(requests):
        return ["The workload has no requests: its rates times its durations are below one."]
    is_by_priority = server.scheduling_policy == "priority"
    if requests.priority is None or not np.ptp(requests.priority):
        return ["No request has a priority other than the others': all are served as they come."] * is_by_priority
    return [] if is_by_priority else ["Priorities of the requests have no effect: `scheduling_policy` is fcfs."]


def with_rejected(summary: dict[str, Any], rejected: np.ndarray) -> dict[str, Any]:
    """Return a simulation's summary with the requests that the server rejected counted as failed."""
    if not rejected.any():
        return summary
    none: dict[str, Any] = {"requests": 0, "completed": 0, "failed": 0, "requests_per_s": None}
    quantiles = {"mean": None, "p50": None, "p90": None, "p99": None}
    none |= {name: dict(quantiles) for name in ("e2e_ms", "ttft_ms", "itl_ms", "tpot_ms")}
    stages = [*summary["stages"], *(dict(none) for _ in range(len(rejected) - len(summary["stages"])))]

    def added(part: dict[str, Any], more: int) -> dict[str, Any]:
        return {**part, "requests": part["requests"] + more, "failed": part["failed"] + more}

    return {
        **summary,
        "overall": added(summary["overall"], int(rejected.sum())),
        "stages": [added(stage, int(n)) for stage, n in zip(stages, rejected, strict=True)],
    }


def _accepted(
    requests: RequestList, workload: Workload, server: ServerConfig
) -> tuple[RequestList, np.ndarray, list[str]]:
    """The requests without those that outgrow the context limit, which are counted by stage.

    Only conversations grow. vLLM rejects a request that is too long, inference-perf counts it as failed and keeps the
    user's context as it was, so that every later turn of the user is rejected, too.
    """
    stage = np.zeros(len(requests), np.int32) if requests.stage is None else requests.stage
    none = np.zeros(len(workload.stages), np.int64)
    if not workload.multi_turn_chat:
        return requests, none, []
    fits = requests.prompt_tokens.astype(np.int64) + requests.output_tokens <= server.max_model_len
    if fits.all():
        return requests, none, []
    if not fits.any():
        return requests, none, []  # the simulator names the first that is too long
    rejected = np.bincount(stage[~fits], minlength=none.size)
    kept = np.flatnonzero(fits)
    content = None if requests.output_content is None else requests.output_content[kept]
    note = (
        f"{int((~fits).sum()):,} of {len(requests):,} turns outgrow `max_model_len` ({server.max_model_len:,} tokens): the "
        "server rejects them, and they count as failed. Without `enable_multi_turn_chat` prompts do not grow."
    )
    shorter = replace(
        requests,
        arrival_s=requests.arrival_s[kept],
        prompt=requests.prompt[kept],
        output_tokens=requests.output_tokens[kept],
        output_content=content,
        stage=stage[kept],
        index=kept,
        priority=None if requests.priority is None else requests.priority[kept],
    )
    return shorter, rejected, [note]


def _sent_by(requests: RequestList, clients: Clients, options: LoadOptions) -> tuple[RequestList, Clients]:
    """Requests and clients as the options for a closed loop, a cap and think times ask for."""
    if options.concurrency is not None and options.max_in_flight is not None:
        raise InputError(
            "`--concurrency` is a closed loop, which ignores arrival times; `--max-in-flight` caps what arrives. Give one."
        )
    if options.concurrency is None and options.max_in_flight is None:
        if options.think_s:
            raise InputError(
                f"`--think-s {options.think_s:g}` needs clients that wait for answers: give `--concurrency` or "
                "`--max-in-flight`, too."
            )
        return requests, clients
    limit = options.concurrency if options.max_in_flight is None else options.max_in_flight
    if limit is not None and limit < 1:
        name = "--concurrency" if options.max_in_flight is None else "--max-in-flight"
        raise InputError(f"`{name}` is {limit}; it must be at least 1.")
    if options.concurrency is not None:
        requests = requests.with_arrivals(clients.stage_offsets_s(requests))
    return requests, replace(clients, max_in_flight=limit, think_s=options.think_s)


def _replayed(path: Path, options: LoadOptions, workload: Workload | None) -> tuple[RequestList, str, list[str]]:
    """Requests of a table or a trace, the name of its run, and notes."""
    from stepcal.datasets.request_traces import cut_and_scale, read_request_trace

    canonical = None if options.format is not None else _canonical(path)
    if canonical is not None:
        table = _one_experiment(canonical, options)
        name, notes = str(table["experiment_id"].iloc[0]), []
    else:
        trace = read_request_trace(path, format_name=options.format)
        name, notes = (
            path.name.partition(".")[0],
            [f"`{path.name}` was read as a trace of the format `{trace.format}`."],
        )
        if trace.left_out:
            notes.append(f"{trace.left_out:,} requests that failed or have no tokens were left out.")
        table = trace.table
        if "experiment_id" in table.columns:
            table = _one_experiment(table, options)
            name = str(table["experiment_id"].iloc[0])
        elif options.experiment is not None:
            raise InputError(
                f"{path} has no `experiment_id`, so `--experiment {options.experiment}` cannot choose one."
            )
    if _is_cut(options):
        table = cut_and_scale(
            table,
            from_s=options.from_s,
            until_s=options.until_s,
            first=options.first,
            rate_scale=1.0 if options.rate_scale is None else options.rate_scale,
        )
    if canonical is not None or workload is not None:
        return replay_requests(table, workload), name, notes
    return replay_trace(table), name, notes


def _canonical(path: Path) -> pd.DataFrame | None:
    """The table if the file is a request table as stepcal writes them, latencies and all; None otherwise."""
    from stepcal.datasets import read_requests_parquet

    if path.suffix not in (".parquet", ""):
        return None
    try:
        return read_requests_parquet(path)
    except InputError:
        if not path.is_file() or not _has_latencies(path):
            return None
        raise


def _has_latencies(path: Path) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from stepcal.datasets.schemas import REQUEST_SCHEMA

    try:
        names = set(pq.read_schema(path).names)
    except (pa.ArrowException, OSError):
        return False
    required = {name for name, column in REQUEST_SCHEMA.columns.items() if column.required}
    return required - {"prompt_tokens"} <= names


def _is_cut(options: LoadOptions) -> bool:
    return any(v is not None for v in (options.first, options.from_s, options.until_s, options.rate_scale))


def _refuse_trace_options(options: LoadOptions) -> None:
    given = {"--first": options.first, "--from": options.from_s, "--until": options.until_s, "--format": options.format,
             "--rate-scale": options.rate_scale}  # fmt: skip
    name = next((option for option, value in given.items() if value is not None), None)
    if name is not None:
        raise InputError(f"`{name}` cuts or scales a trace; give the trace as `--requests`.")


def _run_name(workload: Path | None) -> str:
    """Name of the run that a workload file belongs to: its folder, or the one above ``results``."""
    folders = [] if workload is None else [p.name for p in workload.resolve().parents if p.name not in ("results", "")]
    return folders[0] if folders else "simulated"


def _one_experiment(table: pd.DataFrame, options: LoadOptions) -> pd.DataFrame:
    names = table["experiment_id"].astype(str).unique().tolist()
    wanted = options.experiment or (names[0] if len(names) == 1 else None)
    if wanted is None:
        raise InputError(
            f"{options.requests} holds {len(names)} experiments; name one with `--experiment`: {_listed(names)}."
        )
    if wanted not in names:
        raise InputError(f"{options.requests} has no experiment `{wanted}`. It holds: {_listed(names)}.")
    return table[table["experiment_id"].astype(str) == wanted].reset_index(drop=True)


def _listed(names: list[str]) -> str:
    shown = 20
    return ", ".join(name[:80] for name in names[:shown]) + (", ..." if len(names) > shown else "")
