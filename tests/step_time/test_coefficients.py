"""Coefficients by name and from files: what is read is what was fitted, and bad files are named."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from stepcal.calibration.variants import fit_variant
from stepcal.cli.main import app
from stepcal.datasets import read_steps, simulated_step_rows
from stepcal.datasets.splits import temporal_split
from stepcal.errors import InputError
from stepcal.simulator import CompiledStepTime, ServerConfig, StepBatch
from stepcal.specs.architecture import load_architecture
from stepcal.specs.deployment import Deployment
from stepcal.specs.hardware import load_accelerator
from stepcal.step_time.coefficients import AFFINE_TERMS, SHIPPED_VARIANTS, StepTimeModel, load_coefficients
from stepcal.step_time.compile import AnyStepTime, compile_baseline, compile_corrections
from stepcal.step_time.corrections import Global9
from stepcal.studies.results.records import read_recorded

GPU = load_accelerator("h100-sxm")
LLAMA = load_architecture("llama-2-70b")
SERVER = ServerConfig(kv_blocks=1000, max_num_seqs=16, max_num_batched_tokens=128)
SERVED = Deployment(LLAMA, GPU, 4, SERVER)
BATCHES = [(0, 0), (0, 1), (0, 16), (17, 0), (112, 16), (1, 9)]


def asked_us(clock: AnyStepTime) -> list[float]:
    assert isinstance(clock, CompiledStepTime)
    found = []
    for prefill, decode in BATCHES:
        chunks = np.array([prefill] if prefill else [], dtype=np.int32)
        found.append(sum(clock(StepBatch(chunks, chunks, np.full(decode, 9, dtype=np.int32), 0)).values()))
    return found


def clock_of(coefficients: StepTimeModel) -> AnyStepTime:
    return coefficients.compile(SERVED)


def write(folder: Path, variant: object, *parameters: tuple[str, object]) -> str:
    file = folder / "mine.json"
    file.write_text(
        json.dumps({"variant": variant, "parameters": [{"name": n, "value": v} for n, v in parameters]}),
        encoding="utf-8",
    )
    return str(file)


@pytest.mark.parametrize("name", SHIPPED_VARIANTS)
def test_recorded_fits_go_by_name(name: str) -> None:
    coefficients = load_coefficients(name)
    table = read_recorded("h2").tables["parameters"]
    own = table[table["variant"] == name].set_index("name")["value"]
    assert coefficients.variant == name
    assert coefficients.values == own.to_dict()
    assert name in coefficients.origin
    assert all(t >= 1.0 for t in asked_us(clock_of(coefficients)))


def test_model36_knows_the_families_it_was_fitted_to_only() -> None:
    coefficients = load_coefficients("model36")
    assert len(coefficients.values) == 18
    with pytest.raises(InputError, match="cannot predict `mixtral-8x7b`"):
        coefficients.compile(Deployment(load_architecture("mixtral-8x7b"), GPU, 2, SERVER))


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> tuple[Path, str]:
    """Simulated step rows of a llama-2-70b, as a file, and the name of one experiment of them."""
    rows = simulated_step_rows(seed=3, n_steps=60)
    rows = rows[rows["workload"].eq("general") & rows["model"].isin(["llama-2-70b", "codellama-34b"])]
    file = tmp_path_factory.mktemp("trace") / "steps.parquet"
    rows.to_parquet(file)
    return file, str(rows.loc[rows["model"] == "llama-2-70b", "experiment_id"].iloc[0])


@pytest.mark.parametrize("variant", ["global9", "phase16", "model36"])
def test_what_fit_writes_is_the_same_clock(variant: str, trace, tmp_path, monkeypatch) -> None:
    file, out = trace[0], tmp_path / "fit.json"
    variant_fit = fit_variant(variant, temporal_split(read_steps(file)), GPU)
    # One fit is enough: the command gets the same, and writes it.
    monkeypatch.setattr("stepcal.calibration.variants.fit_variant", lambda *given: variant_fit)
    done = CliRunner().invoke(app, ["fit", variant, "--data", str(file), "--json", str(out)])
    assert done.exit_code == 0, done.stderr
    fitted = variant_fit.fit
    assert fitted is not None
    expected = compile_corrections(fitted.model, fitted.theta, SERVED)
    assert asked_us(clock_of(load_coefficients(str(out)))) == pytest.approx(asked_us(expected), rel=1e-12)


@pytest.mark.parametrize("variant", ["blackbox", "constant", "raw"])
def test_what_fit_writes_of_a_baseline_is_the_same_clock(variant: str, trace, tmp_path) -> None:
    (file, one), out = trace, tmp_path / "fit.json"
    done = CliRunner().invoke(app, ["fit", variant, "--experiment", one, "--data", str(file), "--json", str(out)])
    assert done.exit_code == 0, done.stderr
    steps = read_steps(file)
    baseline = fit_variant(variant, temporal_split(steps[steps["experiment_id"] == one]), GPU).baselines[one]
    expected = compile_baseline(baseline, SERVED)
    assert asked_us(clock_of(load_coefficients(str(out)))) == pytest.approx(asked_us(expected), rel=1e-12)


def test_a_baseline_file_of_several_experiments_is_refused(trace, tmp_path) -> None:
    out = tmp_path / "fit.json"
    assert CliRunner().invoke(app, ["fit", "blackbox", "--data", str(trace[0]), "--json", str(out)]).exit_code == 0
    with pytest.raises(InputError, match=r"fit\.json has \d+ experiments with `intercept`\. Fit.*`--experiment ID`"):
        clock_of(load_coefficients(str(out)))


def test_each_experiment_has_its_own_baseline(trace, tmp_path) -> None:
    out = tmp_path / "fit.json"
    assert CliRunner().invoke(app, ["fit", "blackbox", "--data", str(trace[0]), "--json", str(out)]).exit_code == 0
    steps = read_steps(trace[0])
    baselines = fit_variant("blackbox", temporal_split(steps), GPU).baselines
    assert len(baselines) > 1
    every = load_coefficients(str(out))
    for name, baseline in baselines.items():
        expected = compile_baseline(baseline, SERVED)
        assert asked_us(clock_of(every.of_experiment(name))) == pytest.approx(asked_us(expected), rel=1e-12)
    with pytest.raises(InputError, match=r"says nothing of `another`.*--experiment another"):
        every.of_experiment("another")
    assert load_coefficients("global9").of_experiment("another") == load_coefficients("global9")


def test_an_affine_file_says_whether_host_and_gpu_overlap(tmp_path) -> None:
    terms = [{"name": "constant_us", "value": 100.0}, {"name": "host_constant_us", "value": 30.0}]
    file = tmp_path / "mine.json"
    for combine, expected in (("sum", 130.0), ("max", 100.0), (None, 130.0)):
        more = {} if combine is None else {"combine": combine}
        file.write_text(json.dumps({"variant": "affine", "parameters": terms, **more}))
        assert asked_us(clock_of(load_coefficients(str(file)))) == [expected] * len(BATCHES)
    for variant, combine in (("affine", "mean"), ("raw", "max")):
        file.write_text(json.dumps({"variant": variant, "parameters": [], "combine": combine}))
        with pytest.raises(InputError, match=rf"mine\.json: `combine` is '{combine}' for the variant `{variant}`"):
            load_coefficients(str(file))


def test_the_trees_cannot_be_read_from_a_file(tmp_path) -> None:
    file = write(tmp_path, "xgboost", ("run-a.max_depth", 4.0))
    with pytest.raises(
        InputError, match=r"`xgboost`, which cannot be read from a file\. Known: default, kernels, affine, blackbox"
    ):
        load_coefficients(file)


def test_an_affine_file_gives_the_terms(tmp_path) -> None:
    values = {name: float(i + 1) for i, name in enumerate(AFFINE_TERMS)}
    coefficients = load_coefficients(write(tmp_path, "affine", *values.items()))
    clock = clock_of(coefficients)
    assert isinstance(clock, CompiledStepTime)
    assert {name: getattr(clock, name) for name in AFFINE_TERMS} == values


def test_an_affine_file_may_leave_terms_out(tmp_path) -> None:
    clock = clock_of(load_coefficients(write(tmp_path, "affine", ("constant_us", 100.0), ("decode_requests_us", 2.0))))
    assert asked_us(clock) == [100.0 + 2.0 * decode for _, decode in BATCHES]


NINE = {p.name: p.start for p in Global9().parameters}


@pytest.mark.parametrize(
    ("variant", "parameters", "message"),
    [
        ("spline", {"a": 1.0}, r"mine\.json holds the variant `spline`.*Known: default, kernels, affine"),
        ("affine", {"constant": 1.0}, r"mine\.json: unknown term `constant`\. Terms: constant_us, tokens_us"),
        ("affine", {"constant_us": -3.0}, "`constant_us` is -3.0.*`floor_us`"),
        ("affine", {"constant_us": float("nan")}, r"mine\.json: `constant_us` is nan; coefficients are finite"),
        ("affine", {"kv_us": float("inf")}, "`kv_us` is inf"),
        ("global9", {**NINE, "decode_gemm_mfu": float("nan")}, "`decode_gemm_mfu` is nan"),
        ("global9", {k: v for k, v in NINE.items() if k != "overhead_us"}, r"lacks `overhead_us`.*stepcal fit global9"),
        ("global9", {}, "lacks `prefill_gemm_factor`"),
        ("phase16", NINE, "lacks `prefill_gemm_compute_factor`"),
        ("model36", {}, "lacks `FAMILY.prefill_gemm_factor`"),
        ("model36", {"llama-2-70b.overhead_us": 3.0}, "lacks `llama-2-70b.prefill_gemm_factor`"),
        ("blackbox", {"intercept": 1.0, "prefill_tokens": 1.0}, r"lacks `decode_tokens`.*stepcal fit blackbox"),
        ("blackbox", {"a.intercept": 1.0, "b.intercept": 2.0}, "lacks `prefill_tokens`"),
        ("constant", {"median_us": "fast"}, r"mine\.json: `median_us` is 'fast'; coefficients are finite numbers"),
        ("constant", {"median_us": None}, "`median_us` is None; coefficients are finite numbers"),
    ],
)  # fmt: skip
def test_bad_values_are_named_with_file_and_way_out(variant, parameters, message, tmp_path) -> None:
    file = write(tmp_path, variant, *parameters.items())
    with pytest.raises(InputError, match=message):
        load_coefficients(file)


def test_a_parameter_given_twice_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="has the parameter `median_us` twice"):
        load_coefficients(write(tmp_path, "constant", ("median_us", 1.0), ("median_us", 2.0)))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", '{"variant": "raw"}', '{"parameters": []}', '{"variant": "raw", "parameters": 3}',
                '{"variant": "raw", "parameters": [3]}', '{"variant": "raw", "parameters": [{"name": "x"}]}'],
)  # fmt: skip
def test_what_is_no_coefficient_file_says_what_one_is(content: str, tmp_path) -> None:
    file = tmp_path / "other.json"
    file.write_text(content)
    with pytest.raises(InputError, match=r"other\.json is not a coefficient file .*`variant` and `parameters`"):
        load_coefficients(str(file))


def test_a_file_that_is_no_text_is_refused(tmp_path) -> None:
    file = tmp_path / "other.json"
    file.write_bytes(b"\xff\xfe\x00PAR1")
    with pytest.raises(InputError, match="is not a coefficient file"):
        load_coefficients(str(file))


@pytest.mark.parametrize("name", ["model37", "", "no/such/file.json"])
def test_an_unknown_name_lists_the_recorded_ones(name: str) -> None:
    with pytest.raises(InputError, match=r"set of coefficients\. Known: default, default-2026-11-24, global9, ph"):
        load_coefficients(name)


def test_factors_by_a_zero_utilisation_are_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="prefill_gemm_mfu"):
        clock_of(load_coefficients(write(tmp_path, "global9", *{**NINE, "prefill_gemm_mfu": 0.0}.items())))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param('{"variant": "affine", "parameters": []}', "has no parameters", id="empty"),
        pytest.param(
            '{"variant": "affine", "parameters": [{"name": "constant_us", "value": ' + "9" * 401 + "}]}",
            r"`constant_us` is 9+\.\.\. \(401 digits\); coefficients are finite",
            id="401 digits",
        ),
        pytest.param('{"variant": "affine", "parameters": ' + "9" * 5000 + "}", "Exceeds the limit", id="5000 digits"),
        pytest.param("[" * 200_000, "nested too deeply", id="deep"),
        pytest.param(
            '{"variant": "affine", "parameters": [{"name": "constant_us", "value": true}]}', "is True", id="true"
        ),
    ],
)
def test_a_damaged_file_has_a_short_message(content: str, message: str, tmp_path) -> None:
    file = tmp_path / "damaged.json"
    file.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        load_coefficients(str(file))
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 800


def test_a_byte_order_mark_is_no_fault(tmp_path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('\ufeff{"variant": "affine", "parameters": [{"name": "constant_us", "value": 9}]}')
    assert load_coefficients(str(file)).values == {"constant_us": 9.0}
