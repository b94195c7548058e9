"""``stepcal check`` and ``stepcal calibrate``: how wrong the model is on one's own server, and what its logs teach."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from stepcal.cli.output import Json, emit
from stepcal.cli.server_options import (
    AcceleratorName,
    Architecture,
    Degree,
    KvBlocks,
    KvCacheDtype,
    MaxModelLen,
    MaxNumSeqs,
    MaxTokens,
    Model,
    OffloadGib,
    PrefixCaching,
    PromptTexts,
    VllmVersion,
    server_options,
)
from stepcal.files import refuse_unwritable, write_atomically

Folder = Annotated[Path, typer.Argument(help="Folder that `stepcal ingest` wrote, or one of inference-perf runs.")]


def check(
    folder: Folder,
    architecture: Architecture = None,
    accelerator: AcceleratorName = None,
    tp: Degree = None,
    kv_blocks: KvBlocks = None,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: MaxTokens = None,
    max_model_len: MaxModelLen = None,
    enable_prefix_caching: PrefixCaching = None,
    kv_cache_dtype: KvCacheDtype = None,
    vllm_version: VllmVersion = None,
    kv_offloading_gib: OffloadGib = None,
    prompt_texts: PromptTexts = None,
    coefficients: Model = "default",
    json_out: Json = None,
) -> None:
    """Compare what a server's clients saw with what the model predicts, by stage and percentile; name likely mistakes.

    Exit status 1 says that something looks like a mistake. Example: stepcal check mine --architecture llama-2-7b
    --accelerator h100-sxm --tp 1
    """
    from stepcal.servers.checks import CheckOptions, check_log, shared_notes
    from stepcal.servers.coefficient_file import load_known
    from stepcal.servers.log import read_logs

    options = server_options(
        architecture,
        accelerator,
        tp,
        kv_blocks,
        max_num_seqs,
        max_num_batched_tokens,
        max_model_len,
        enable_prefix_caching,
        kv_offloading_gib,
        kv_cache_dtype=kv_cache_dtype,
        vllm_version=vllm_version,
    )
    known = load_known(coefficients)
    logs = read_logs(folder, options, prompt_texts=prompt_texts)
    checks = [check_log(log, CheckOptions(known.coefficients, known.validity)) for log in logs]
    notes = shared_notes([(c.run, c.notes) for c in checks])
    result = {"coefficients": coefficients, "runs": [c.summary() for c in checks], "notes": notes}
    emit(result, json_out, "\n".join([*(c.report() for c in checks), *(f"note: {note}" for note in notes)]))
    if any(c.suspicions for c in checks):
        raise typer.Exit(1)


def calibrate(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", help="Coefficient file to write.")] = Path("stepml_coefficients.json"),
    architecture: Architecture = None,
    accelerator: AcceleratorName = None,
    tp: Degree = None,
    kv_blocks: KvBlocks = None,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: MaxTokens = None,
    max_model_len: MaxModelLen = None,
    enable_prefix_caching: PrefixCaching = None,
    kv_cache_dtype: KvCacheDtype = None,
    vllm_version: VllmVersion = None,
    kv_offloading_gib: OffloadGib = None,
    prompt_texts: PromptTexts = None,
    prior: Annotated[str, typer.Option("--prior", help="Coefficients that the data correct.")] = "default",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the intervals' draws.")] = 0,
    json_out: Json = None,
) -> None:
    """Learn from request logs what they determine, with the shipped model as prior; judge it where it was not fitted.

    Example: stepcal calibrate mine --architecture llama-2-7b --accelerator h100-sxm --tp 1 --out mine.json
    """
    from stepcal.exchange.stepml import json_text
    from stepcal.servers.checks import log_notes, shared_notes
    from stepcal.servers.coefficient_file import calibrated_file
    from stepcal.servers.judgement import judge_calibration
    from stepcal.servers.log import log_hashes, read_logs
    from stepcal.servers.priors import prior_of

    refuse_unwritable(out)
    options = server_options(
        architecture,
        accelerator,
        tp,
        kv_blocks,
        max_num_seqs,
        max_num_batched_tokens,
        max_model_len,
        enable_prefix_caching,
        kv_offloading_gib,
        kv_cache_dtype=kv_cache_dtype,
        vllm_version=vllm_version,
    )
    start, parameters = prior_of(prior)
    logs = read_logs(folder, options, prompt_texts=prompt_texts)
    judgement = judge_calibration(logs, start, parameters, seed=seed)
    file = calibrated_file(judgement, logs, log_hashes(folder), prior)
    write_atomically(out, json_text(file))
    result: dict[str, Any] = {
        "file": str(out),
        "learned": judgement.calibration.learned,
        "log_odds": judgement.calibration.log_odds,
        "error_factor": judgement.calibration.error_factor,
        "determined": list(judgement.calibration.identified),
        "parameters": [_parameter(p, judgement.calibration, start.values) for p in file.parameters],
        "errors": judgement.errors.to_dict("records"),
        "left_out_stages": judgement.left_out.to_dict("records"),
        "bias": judgement.bias.to_dict("records"),
        "log_sd": judgement.log_sd,
        "validity": judgement.validity.document(),
        "notes": shared_notes([(log.run, log_notes(log, start)) for log in logs]),
    }
    lines = [*_calibration_lines(judgement, start.values, prior, out), *(f"note: {n}" for n in result["notes"])]
    emit(result, json_out, "\n".join(lines))


def _parameter(entry: Mapping[str, Any], fitted: Any, prior: Mapping[str, float]) -> dict[str, Any]:
    """A parameter of the file, with the prior's value, the median that its interval is around, and its state."""
    name = entry["name"]
    if "low" not in entry:
        return {**entry, "prior": prior[name]}
    return {**entry, "prior": prior[name], "median": fitted.free(name), "state": fitted.state(name)}


def _calibration_lines(judgement: Any, values: Mapping[str, float], prior: str, out: Path) -> list[str]:
    from stepcal.servers.coefficient_file import learned_words, parameter_lines
    from stepcal.servers.inference.learning import GPU_SPEED

    fitted = judgement.calibration
    lines = [f"{out}: {learned_words(fitted)} (prior: {prior})"]
    if fitted.learned:
        speed = f"{GPU_SPEED} moves all times of the GPU, " if GPU_SPEED in fitted.learned else ""
        kept = f"{speed}all else keeps the prior's values"
        lines.append(f"  odds against the prior's values: e^{fitted.log_odds:.1f} to 1; {kept}")
    known = f"{len(fitted.identified)} of {len(fitted.parameters)}"
    lines.append(
        f"values that the data determine: {known} (learned by themselves, or known to half of the prior's spread)"
    )
    lines += parameter_lines(fitted, values)
    lines.append("signed error of means (%), before -> after")
    for table in (judgement.errors, judgement.left_out):
        for (run, part, metric), rows in table.groupby(["run", "part", "metric"], sort=False):
            by = dict(zip(rows["model"], rows["error_percent"], strict=True))
            lines.append(f"  {run:<34}{part:<12}{metric:<6}{by['before']:>+8.1f} ->{by['after']:>+7.1f}")
    lines += _left_out_lines(judgement.left_out)
    sd = judgement.log_sd
    if math.isfinite(sd):
        lines.append(f"E2E out of sample: {100 * sd:.1f}% root mean square over {judgement.n_out} figures")
    return lines


def _left_out_lines(left_out: Any) -> list[str]:
    """Whether calibrating helped on stages that it did not see: the only errors here that no fit saw."""
    e2e = left_out[left_out["metric"] == "e2e"]
    if e2e.empty:
        return ["no stage could be left out: that the calibration helps elsewhere is not shown by these logs"]
    size = e2e["error_percent"].abs().groupby(e2e["model"]).mean()
    before, after = float(size["before"]), float(size["after"])
    word = "kept" if after == before else "better" if after < before else "WORSE: keep the prior"
    return [f"stages left out, mean absolute error of E2E: {before:.1f}% before, {after:.1f}% after: {word}"]


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder to make.")],
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of arrivals, lengths and errors.")] = 0,
) -> None:
    """Write a demo data set: what a load generator would have written of a simulated server, with its settings.

    Example: stepcal demo --out raw
    """
    from stepcal.servers.demo import write_demo

    for path in write_demo(out, seed=seed):
        typer.echo(str(path), err=True)
