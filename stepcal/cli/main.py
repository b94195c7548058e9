"""The `stepcal` command: fits, verdicts, recordings and the book.

JSON goes to a file or, with ``-``, alone to standard output; messages go to standard error. Exit status: 0 done, 1 a check
that does not hold, 2 bad input.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepcal.cli.cache import cache
from stepcal.cli.evaluate import evaluate
from stepcal.cli.export import export
from stepcal.cli.ingest import ingest
from stepcal.cli.output import Json, emit, reports_errors
from stepcal.cli.own_server import calibrate, check, demo
from stepcal.cli.planning import compare, plan, predict
from stepcal.cli.report import report
from stepcal.cli.simulate_command import simulate
from stepcal.cli.upkeep import design, drift

if TYPE_CHECKING:
    import pandas as pd

app = typer.Typer(
    help="How long does one step of an LLM server take? Fit step-time models to traces, judge them by frozen rules.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes and colours would double the time that help takes
)


@app.callback()
def _messages() -> None:
    """Show the package's own messages, on standard error."""
    log = logging.getLogger("stepcal")
    log.setLevel(logging.INFO)
    log.handlers = [logging.StreamHandler(sys.stderr)]


Data = Annotated[
    Path | None,
    typer.Option(
        "--data", help="Folder with the traces, or one trace file. Default: the folder that STEPCAL_DATA names."
    ),
]


@app.command()
@reports_errors
def fit(
    variant: Annotated[
        str, typer.Argument(help="raw, constant, bucket, blackbox, xgboost, global9, phase16 or model36.")
    ],
    experiment: Annotated[
        list[str] | None, typer.Option("--experiment", help="Use only this experiment; may be given several times.")
    ] = None,
    accelerator: Annotated[
        str, typer.Option("--accelerator", help="GPU of the traces, whose peak rates the components are divided by.")
    ] = "h100-sxm",
    data: Data = None,
    json_out: Json = None,
) -> None:
    """Fit a step-time model to step traces and score it on the last fifth of each experiment.

    Example: stepcal fit global9 --experiment 20260217-202857-llama-2-70b-tp4-general --json -
    """
    from stepcal.calibration.variants import fit_variant
    from stepcal.datasets import content_sha256
    from stepcal.datasets.splits import select_experiments, temporal_split
    from stepcal.evaluation.step_errors import score_steps
    from stepcal.specs.hardware import load_accelerator

    steps = select_experiments(_load_rows(data), experiment or [])
    split = temporal_split(steps)
    fitted = fit_variant(variant, split, load_accelerator(accelerator))
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
    emit(result, json_out, "\n".join(lines))


@app.command()
@reports_errors
def verdict(
    hypothesis: Annotated[
        str, typer.Argument(help="A pre-registered hypothesis: h1, h2, h2_step, h1b, h2b, h3 or h4.")
    ],
    experiments: Annotated[
        Path | None,
        typer.Option(
            "--experiments",
            help="Folder of experiments in the public layout; for h3 and h4, of the new runs. Default: STEPCAL_DATA; "
            "for h3 the 31 runs of data/transfer; h4 is not evaluated without one.",
        ),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Judge the study's published figures instead of our own.")
    ] = False,
    accelerator: Annotated[
        str | None,
        typer.Option(
            "--accelerator", help="For h3 and h4: GPU of runs that do not name one. Default: as in `evaluate`."
        ),
    ] = None,
    json_out: Json = None,
) -> None:
    """Judge a hypothesis by its frozen rules, with the evidence for each criterion.

    Without traces the recorded evidence is judged, and the output says so. Examples: stepcal verdict h2;
    stepcal verdict h3 --experiments my-runs
    """
    from stepcal.studies.verdicts import verdict_of

    judged, provenance = verdict_of(hypothesis, data=experiments, published=published, accelerator=accelerator)
    result = {
        "hypothesis": judged.preregistration.id,
        "verdict": judged.verdict,
        "possible": list(judged.possible),
        "status": judged.preregistration.status,
        "standing": judged.preregistration.standing,
        "preregistration_sha256": judged.preregistration.sha256,
        "evidence_from": provenance.kind,
        "notes": list(judged.notes),
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
    emit(
        result,
        json_out,
        f"{judged.report()}\n  Evidence: {provenance.brief()}.",
    )


@app.command()
@reports_errors
def download() -> None:
    """Fetch the public traces (about 35 MB) at their pinned commits, check their hashes, and keep them in a cache.

    Afterwards every command finds them there, and STEPCAL_DATA need not be set.
    """
    from stepcal.datasets import load_requests, load_steps, load_xgboost_predictions
    from stepcal.locations import cache_folder

    for load in (load_steps, load_xgboost_predictions, load_requests):
        typer.echo(f"{load.__name__.removeprefix('load_')}: {len(load(download=True)):,} rows", err=True)
    typer.echo(str(cache_folder()))


@app.command()
@reports_errors
def record(
    studies: Annotated[list[str] | None, typer.Argument(help="Studies to record or check; all by default.")] = None,
    data: Data = None,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit with 1 if a recording differs from what is computed.")
    ] = False,
) -> None:
    """Compute the results that need traces and write them to data/recorded, for builds without traces.

    With --check, a table may differ from its recording by its tolerance in data/recorded/tolerances.csv: a share of its
    interval, or of the last place that a page shows. The largest difference is printed in units of that.
    Examples: stepcal record --check; stepcal record h2 end_to_end
    """
    from stepcal.studies.results.record_all import check_all, record_all

    if not check:
        for path in record_all(data, only=studies or ()):
            typer.echo(f"wrote {path}", err=True)
        return
    largest = []
    for name, differences in check_all(data, only=studies or ()):
        for found in differences:
            if found.size > 1.0:
                typer.echo(f"{name}: {found}", err=True)
        worst = max(differences, key=lambda found: found.size)
        largest.append((worst.size, name, worst))
        typer.echo(f"{name}: largest difference {worst.size:.2g} of its tolerance", err=True)
    size, name, worst = max(largest, key=lambda row: row[0])
    typer.echo(f"largest difference: {size:.2g} of its tolerance ({name}, {worst.table} {worst.column})", err=True)
    if size > 1.0:
        raise typer.Exit(1)


def _load_rows(data: Path | None) -> pd.DataFrame:
    from stepcal.datasets import load_steps, read_steps

    return read_steps(data) if data is not None and data.is_file() else load_steps(data)


def _estimate(estimate: Any) -> dict[str, Any]:
    keys = ("name", "value", "unit", "low", "high", "identified", "reason")
    return {key: getattr(estimate, key) for key in keys}


app.command()(reports_errors(ingest))
app.command()(reports_errors(simulate))
app.command()(reports_errors(evaluate))
app.command()(reports_errors(report))
app.command()(reports_errors(cache))
app.command()(reports_errors(check))
app.command()(reports_errors(calibrate))
app.command()(reports_errors(design))
app.command()(reports_errors(drift))
app.command()(reports_errors(predict))
app.command()(reports_errors(compare))
app.command()(reports_errors(plan))
app.command()(reports_errors(demo))
app.command()(reports_errors(export))

if __name__ == "__main__":
    app()
