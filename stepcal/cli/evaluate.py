"""``stepcal evaluate``: measured experiments beside what is predicted of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from stepcal.cli.output import FOUND, Json, emit, progress_options
from stepcal.errors import InputError, shown
from stepcal.files import refuse_unwritable

ARRIVALS = ("replayed", "poisson", "constant")


def evaluate(
    coefficients: Annotated[
        str,
        typer.Option(
            "--coefficients",
            help="default, default-2026-11-24 (physical, frozen), global9, phase16, model36, or a file that "
            "`stepcal fit --json` wrote.",
        ),
    ] = "default",
    experiments: Annotated[
        Path | None,
        typer.Option("--experiments", help="Folder of your own experiments. Default: the 16 experiments of the study."),
    ] = None,
    arrivals: Annotated[
        str | None,
        typer.Option("--arrivals", help="replayed, poisson or constant. Default: replayed where requests are at hand."),
    ] = None,
    accelerator: Annotated[
        str | None,
        typer.Option(
            "--accelerator", help="GPU of experiments that do not name one. Default: as in the run's name, or h100-sxm."
        ),
    ] = None,
    kv_offloading_gib: Annotated[
        float | None,
        typer.Option("--kv-offloading-gib", help="`kv_offloading_size` of experiments that do not say. Default: none."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of generated arrivals.")] = 0,
    json_out: Json = None,
) -> None:
    """Simulate measured experiments end to end and compare latencies with what clients saw.

    Arrivals go in, latencies come out; nothing of the measured latencies is used. Example: stepcal evaluate --json -
    """
    from stepcal.evaluation.evaluate import evaluate as evaluate_cases
    from stepcal.step_time.coefficients import load_coefficients

    if json_out not in (None, "-"):
        refuse_unwritable(Path(json_out))
    if arrivals not in (None, *ARRIVALS):
        raise InputError(f"`--arrivals` is {shown(arrivals)}; it must be one of {', '.join(ARRIVALS)}.")
    fitted = load_coefficients(coefficients)
    cases, bad = _cases(experiments, accelerator, kv_offloading_gib)

    def note(name: str, error: InputError) -> None:
        bad[name] = str(error)

    judged = evaluate_cases(fitted, _in_turn(cases), process=arrivals, seed=seed, on_error=note)
    if not judged["per_experiment"]:
        raise InputError("\n".join(list(bad.values())[:5]))
    result = {"coefficients": coefficients, **judged}
    if bad:
        result["bad_runs"] = [{"experiment_id": name, "reason": reason} for name, reason in bad.items()]
    emit(result, json_out, "\n".join([*_lines(result), *(f"  {n}: cannot be used. {why}" for n, why in bad.items())]))
    if bad:
        raise typer.Exit(FOUND)


def _cases(
    experiments: Path | None, accelerator: str | None, kv_offloading_gib: float | None
) -> tuple[list[Any], dict[str, str]]:
    """Experiments with what was measured, and why others cannot be used."""
    from stepcal.datasets import have_traces, load_requests
    from stepcal.experiments.folders import read_usable_runs
    from stepcal.experiments.latencies import measured_latencies
    from stepcal.studies.published_runs import load_experiments

    if experiments is not None:
        return read_usable_runs(experiments, accelerator=accelerator, kv_offloading_gib=kv_offloading_gib)
    at_hand = have_traces()
    return [(e, measured_latencies(e)) for e in load_experiments(load_requests() if at_hand else None)], {}


def _in_turn(cases: list[Any]) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(cases, unit=" experiments", **progress_options())


def _lines(result: dict[str, Any]) -> list[str]:
    """What a terminal shows of the result."""
    rows, arrivals = result["per_experiment"], result["arrivals"]
    lines = [f"{result['coefficients']}, {arrivals} arrivals: signed error of the mean over completed requests (%)"]
    lines += [_evaluation_line(row, arrivals) for row in rows]
    lines += _note_lines(rows)
    n_evaluable = sum(row["e2e_error_percent"] is not None for row in rows)
    if n_evaluable:
        lines.append(
            f"  E2E: mean |error| {result['mean_abs_e2e_error_percent']:.1f}%, MSPE {result['mspe_percent']:+.1f}%, "
            f"{result['n_below_10_percent']} of {n_evaluable} evaluable experiments below 10%"
        )
    return lines


def _evaluation_line(row: dict[str, Any], arrivals: str) -> str:
    if row["e2e_error_percent"] is None:
        return f"  {row['experiment_id']}: not evaluable. {row.get('reason', 'No request completed.')}"
    errors = ", ".join(
        f"{label} {'not evaluable' if row[key] is None else format(row[key], '+.1f')}"
        for label, key in (("E2E", "e2e_error_percent"), ("TTFT", "ttft_error_percent"), ("TPOT", "tpot_error_percent"))
    )
    failed = f"failed {row['predicted']['failed']:,} (measured {row['measured']['failed']:,})"
    return f"  {row['experiment_id']}: {errors}; {failed}" + (
        "" if row["arrivals"] == arrivals else f"; {row['arrivals']}"
    )


def _note_lines(rows: list[dict[str, Any]]) -> list[str]:
    """One line a note, with the experiments that it is about, or their number."""
    about: dict[str, list[str]] = {}
    for row in rows:
        for note in row["notes"]:
            about.setdefault(note, []).append(row["experiment_id"])
    few = 3
    return [
        f"  Note: {note} ({', '.join(n) if len(n) <= few else f'{len(n)} experiments'})" for note, n in about.items()
    ]
