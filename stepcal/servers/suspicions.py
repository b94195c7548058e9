"""Mistakes that a log shows: rows that cannot be right, and readings of the same log under which it fits far better."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from stepcal.errors import InputError
from stepcal.servers.log import ServedLog
from stepcal.servers.replay import replayed_latencies_s
from stepcal.specs.deployment import Deployment
from stepcal.specs.hardware import accelerators
from stepcal.specs.step_work import floor_us
from stepcal.step_time.coefficients import StepTimeModel
from stepcal.units import US_PER_S, BoolArray, FloatArray, IntArray

FAR_OFF = 0.2
"""Log error of the mean from which another reading is looked for: more than any calibrated GPU's error out of sample."""
FAR_BETTER = 3.0
"""Another reading is named only if it divides the error by this."""
SLOWER_THAN_ANY = 100.0
"""Multiple of a step's floor beyond which a time per token is no time of a server: a unit is wrong."""
FEW_EVENTS, MANY_EVENTS = 0.75, 1.25
"""Events a token outside of which stream events are not tokens."""
AT_THE_CAP = 0.2
"""Share of arrivals that find the most requests in flight ever seen, from which that number is a cap."""
SMALLEST_CAP = 4
DEGREES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Suspicion:
    """Something that looks like a mistake.

    Attributes
    ----------
    kind : str
        Short name, as in the error catalogue.
    text : str
        What was seen, and what to do.
    """

    kind: str
    text: str


def suspicions(log: ServedLog, coefficients: StepTimeModel, e2e_s: FloatArray, ttft_s: FloatArray) -> list[Suspicion]:
    """Look for mistakes in a log.

    Parameters
    ----------
    log : ServedLog
    coefficients : StepTimeModel
    e2e_s, ttft_s : ndarray, shape (n_requests,)
        Predicted with them.

    Returns
    -------
    list of Suspicion
    """
    found = [*_of_rows(log)]
    kinds = {s.kind for s in found}
    if not kinds & {"units", "swapped-latencies", "swapped-tokens"}:
        found += _of_readings(log, coefficients, e2e_s, ttft_s)
    return found


def _of_rows(log: ServedLog) -> Iterator[Suspicion]:
    """What the rows show by themselves."""
    if log.e2e_s is None or log.ttft_s is None:
        return
    e2e, ttft = log.e2e_s, log.ttft_s
    done = ~np.isnan(e2e)
    prompt = np.asarray(log.requests.prompt_tokens, dtype=np.int64)
    output = np.asarray(log.requests.output_tokens, dtype=np.int64)
    pace_s = float(np.median(e2e[done] / output[done]))
    floor_s = float(floor_us(np.ones(1), np.zeros(1), log.deployment)[0]) / US_PER_S
    if pace_s > SLOWER_THAN_ANY * floor_s or pace_s < floor_s / SLOWER_THAN_ANY:
        yield Suspicion(
            "units",
            f"a token takes {pace_s:.3g} s, where reading the weights once takes {floor_s:.3g} s. Are latencies in another "
            "unit (ms for s)? Give the unit in the mapping.",
        )
    elif pace_s < 0.5 * floor_s:
        by_prompt = float(np.median(e2e[done] / prompt[done]))
        swapped = by_prompt > floor_s
        yield Suspicion(
            "swapped-tokens" if swapped else "faster-than-memory",
            f"a token takes {pace_s:.3g} s, less than reading the weights once ({floor_s:.3g} s). "
            + (
                "Are prompt and output tokens swapped?"
                if swapped
                else "Another GPU, more ranks, or narrower weights than said?"
            ),
        )
    if np.nanmedian(ttft[done]) > 0.98 * np.nanmedian(e2e[done]) and np.median(output[done]) > SMALLEST_CAP:
        yield Suspicion(
            "swapped-latencies", "the first token comes as late as the last. Is TTFT the end-to-end latency?"
        )
    yield from _of_events(log, output)
    yield from _of_cap(log, e2e, done)


def _of_events(log: ServedLog, output: IntArray) -> Iterator[Suspicion]:
    if log.stream_events is None or np.isnan(log.stream_events).all():
        return
    share = float(np.nanmedian(log.stream_events / output))
    if not FEW_EVENTS < share < MANY_EVENTS:
        yield Suspicion(
            "events-not-tokens",
            f"there are {share:.2f} stream events a token: the tool's own inter-token latency counts events. Ours is "
            "computed from tokens; compare with that.",
        )


def _of_cap(log: ServedLog, e2e: FloatArray, done: BoolArray) -> Iterator[Suspicion]:
    """Requests in flight that stand at one number: the client's cap, or the server's `max_num_seqs`."""
    start = log.requests.arrival_s
    end = start + np.where(done, e2e, min(log.timeout_s, 1e9))
    in_flight = np.arange(1, len(start) + 1) - np.searchsorted(np.sort(end), start, side="right")
    most = int(in_flight.max())
    share = float((in_flight == most).mean())
    if most >= SMALLEST_CAP and share > AT_THE_CAP:
        yield Suspicion(
            "client-cap",
            f"{100 * share:.0f}% of requests were sent when {most} were in flight, the most ever: the client's cap was "
            "reached (--max-concurrency, worker_max_concurrency), and what waited for it is in no latency. A rate "
            "read off this log is the client's.",
        )


def _of_readings(
    log: ServedLog, coefficients: StepTimeModel, e2e_s: FloatArray, ttft_s: FloatArray
) -> Iterator[Suspicion]:
    """Readings of the log under which the prediction fits far better."""
    own = distance(log, e2e_s, ttft_s)
    if own < FAR_OFF:
        return
    best: tuple[float, str, str] | None = None
    for kind, text, reading in _readings(log):
        try:
            other = distance(log, *replayed_latencies_s(reading, coefficients))
        except InputError:  # what does not fit into memory is no reading
            continue
        if other * FAR_BETTER < own and (best is None or other < best[0]):
            best = (other, kind, text)
    if best is not None:
        yield Suspicion(
            best[1],
            f"{best[2]} explains the log far better (mean log error {best[0]:.2f} instead of {own:.2f}). Check it.",
        )


def distance(log: ServedLog, e2e_s: FloatArray, ttft_s: FloatArray) -> float:
    """Mean absolute log error of the means by stage: of E2E, and of TTFT with half the weight."""
    errors = []
    known = log.summaries[log.summaries["statistic"] == "mean"].set_index(["split", "metric"])["value"]
    stages = np.unique(log.stage)
    for stage in stages:
        split = f"stage {stage}" if len(stages) > 1 else "whole"
        for metric, values, weight in (("e2e", e2e_s, 1.0), ("ttft", ttft_s, 0.5)):
            here = values[(log.stage == stage) & ~np.isnan(values)]
            if (split, metric) in known.index and here.size:
                errors.append(weight * abs(float(np.log(1e3 * here.mean() / known[split, metric]))))
    return float(np.mean(errors)) if errors else float("inf")


def _readings(log: ServedLog) -> Iterator[tuple[str, str, ServedLog]]:
    own = log.deployment
    for degree in DEGREES:
        if degree != own.tensor_parallel:
            with_degree = _with(log, tensor_parallel=degree)
            if with_degree is not None:
                yield (
                    "tensor-parallel",
                    f"A tensor-parallel degree of {degree} instead of {own.tensor_parallel}",
                    with_degree,
                )
    for name, gpu in accelerators().items():
        if name != own.accelerator.name:
            with_gpu = _with(log, accelerator=gpu)
            if with_gpu is not None:
                yield "accelerator", f"The GPU `{name}` instead of `{own.accelerator.name}`", with_gpu
    caching = own.limits.enable_prefix_caching
    word = "off" if caching else "on"
    deployment = own.with_server(enable_prefix_caching=not caching)
    yield "prefix-cache", f"Prefix caching {word}", replace(log, deployment=deployment)
    if own.offload_blocks == 0 and own.limits.release.holds_offloaded_blocks:
        pool = own.with_server(offload_blocks=max(own.limits.kv_blocks // 2, 1))
        yield "offload-pool", "A full pool of KV offloading in CPU memory", replace(log, deployment=pool)
    for fewer in (own.limits.max_num_seqs // 2, own.limits.max_num_seqs // 4):
        if fewer >= 1:
            text = f"`max_num_seqs` {fewer} instead of {own.limits.max_num_seqs}"
            yield "max-num-seqs", text, replace(log, deployment=own.with_server(max_num_seqs=fewer))


def _with(log: ServedLog, **changes: object) -> ServedLog | None:
    """The log on another deployment; None where the model does not go there."""
    try:
        return replace(log, deployment=replace(log.deployment, **changes))  # type: ignore[arg-type]
    except InputError:
        return None


def label_suspicion(duration_us: FloatArray, interval_us: FloatArray) -> Suspicion | None:
    """Name a step label that is the scheduler's own time: far below the time from one step to the next."""
    ratio = float(np.nanmedian(interval_us / duration_us))
    if ratio < FAR_BETTER:
        return None
    return Suspicion(
        "scheduler-label",
        f"steps start {ratio:.0f} times as far apart as their label says: `step.duration_us` is the time of `schedule()` on "
        "the CPU, not the step. Use the difference of start times.",
    )


def deployment_text(deployment: Deployment) -> str:
    """Return a deployment in a few words."""
    return f"{deployment.architecture.name} on {deployment.tensor_parallel} x {deployment.accelerator.name}"
