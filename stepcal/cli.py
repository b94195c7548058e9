"""The `stepcal` command: fits, verdicts, recordings and the book.

JSON goes to a file or, with ``-``, alone to standard output; messages go to standard error. Exit status: 0 done, 1 a check
that does not hold, 2 bad input.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import pandas as pd
import typer

from stepcal.errors import StepcalError
from stepcal.files import write_atomically

P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    help="How long does one step of an LLM server take? Fit step-time models to traces, judge them by frozen rules.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Data = Annotated[
    Path | None,
    typer.Option(
        "--data", help="Folder with the traces, or one trace file. Default: the folder that STEPCAL_DATA names."
    ),
]
Json = Annotated[
    str | None, typer.Option("--json", help="Write the result as JSON to this file, or `-` for standard output.")
]


def _reports_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn an expected error into its message and exit status 2."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except StepcalError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(2) from None

    return wrapped


@app.command()
@_reports_errors
def fit(
    variant: Annotated[
        str, typer.Argument(help="raw, constant, bucket, blackbox, xgboost, global9, phase16 or model36.")
    ],
    experiment: Annotated[
        list[str] | None, typer.Option("--experiment", help="Use only this experiment; may be given several times.")
    ] = None,
    data: Data = None,
    json_out: Json = None,
) -> None:
    """Fit a step-time model to step traces and score it on the last fifth of each experiment.

    Example: stepcal fit global9 --experiment 20260217-202857-llama-2-70b-tp4-general --json -
    """
    from stepcal.datasets import content_sha256
    from stepcal.evaluation import score_steps
    from stepcal.hardware import load_accelerator
    from stepcal.splits import temporal_split
    from stepcal.studies import ACCELERATOR, select_experiments
    from stepcal.variants import fit_variant

    steps = select_experiments(_load_rows(data), experiment or [])
    split = temporal_split(steps)
    fitted = fit_variant(variant, split, load_accelerator(ACCELERATOR))
    scores = score_steps(fitted.predict_us(split.test), split.test, n_resamples=None)
    wide = scores.pivot(index="experiment_id", columns="metric", values="value")
    n_train = split.train.groupby("experiment_id", observed=True).size()
    n_test = split.test.groupby("experiment_id", observed=True).size()
    result: dict[str, Any] = {
        "variant": variant,
        "parameters": [_estimate(e) for e in fitted.estimates],
        "combinations": [_estimate(e) for e in fitted.combinations],
        "per_experiment": [
            {
                "experiment_id": str(one),
                "n_train": int(n_train[one]),
                "n_test": int(n_test[one]),
                **{key: float(wide.loc[one, key]) for key in ("mape_percent", "mspe_percent", "r")},
            }
            for one in wide.index
        ],
        "data_sha256": content_sha256(steps),
    }
    lines = [fitted.fit.report() if fitted.fit else f"{variant}, {len(split.train):,} training steps"]
    lines += [
        f"  {row['experiment_id']}: MAPE {row['mape_percent']:.1f}%, MSPE {row['mspe_percent']:+.1f}% "
        f"(mean over {row['n_test']:,} test steps)"
        for row in result["per_experiment"]
    ]
    _emit(result, json_out, "\n".join(lines))


@app.command()
@_reports_errors
def verdict(
    hypothesis: Annotated[str, typer.Argument(help="A pre-registered hypothesis: h1, h2 or h2_step.")],
    experiments: Annotated[
        Path | None,
        typer.Option("--experiments", help="Folder of experiments in the public layout. Default: STEPCAL_DATA."),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Judge the study's published figures instead of our own.")
    ] = False,
    json_out: Json = None,
) -> None:
    """Judge a hypothesis by its frozen rules, with the evidence for each criterion.

    Without traces the recorded evidence is judged, and the output says so. Example: stepcal verdict h2
    """
    from stepcal.studies import verdict_of

    judged, provenance = verdict_of(hypothesis, data=experiments, published=published)
    result = {
        "hypothesis": judged.preregistration.id,
        "verdict": judged.verdict,
        "possible": list(judged.possible),
        "status": judged.preregistration.status,
        "preregistration_sha256": judged.preregistration.sha256,
        "evidence_from": provenance.kind,
        "data_sha256": provenance.data_sha256,
        "criteria": [
            {
                "name": r.criterion.name,
                "role": r.role,
                "statement": r.criterion.statement,
                "threshold": r.criterion.threshold,
                "value": r.value,
                "met": r.met,
                "evidence": r.evidence,
            }
            for r in judged.criteria
        ],
    }
    _emit(
        result,
        json_out,
        f"{judged.report()}\n  Evidence: {provenance.kind}, content hash {provenance.data_sha256[:12]}.",
    )


@app.command()
@_reports_errors
def record(
    data: Data = None,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit with 1 if a recording differs from what is computed.")
    ] = False,
) -> None:
    """Compute the results that need traces and write them to data/recorded, for builds without traces."""
    from stepcal.recording import record_all

    differences = record_all(data, check=check)
    for line in differences:
        typer.echo(line, err=True)
    if check and differences:
        raise typer.Exit(1)


@app.command()
@_reports_errors
def report(
    output: Annotated[Path, typer.Option("--output", help="Folder for the built book.")] = Path("_build"),
    source: Annotated[
        str, typer.Option("--source", help="measured (recorded where traces are missing) or simulated.")
    ] = "measured",
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Notebooks that run at once.")] = 2,
) -> None:
    """Execute the notebooks and build the book; prints the path of its first page."""
    from stepcal.report import build_report

    typer.echo(str(build_report(output, source=source, jobs=jobs)))


def _load_rows(data: Path | None) -> pd.DataFrame:
    from stepcal.datasets import load_steps, read_steps

    return read_steps(data) if data is not None and data.is_file() else load_steps(data)


def _estimate(estimate: Any) -> dict[str, Any]:
    keys = ("name", "value", "unit", "low", "high", "identified", "reason")
    return {key: getattr(estimate, key) for key in keys}


def _emit(result: dict[str, Any], json_out: str | None, text: str) -> None:
    """Print the text to standard error, and the JSON where it was asked for."""
    typer.echo(text, err=True)
    if json_out is None:
        return
    serialised = json.dumps(_without_nan(result), indent=2, allow_nan=False) + "\n"
    if json_out == "-":
        typer.echo(serialised, nl=False)
    else:
        write_atomically(Path(json_out), serialised)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    app()
