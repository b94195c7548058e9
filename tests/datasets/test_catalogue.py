"""Finding traces: local folder, cache, download, and what is said when a copy is missing or changed. No network."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from stepcal.datasets import (
    content_sha256,
    have_traces,
    load_requests,
    load_steps,
    load_xgboost_predictions,
    published_h2,
    validate_requests,
)
from stepcal.datasets.catalogue import PREDICTIONS_FILE, REQUESTS_FILE, STEPS_FILE
from stepcal.datasets.facts import joined_tables, public_files
from stepcal.datasets.request_join import join_requests
from stepcal.errors import InputError, MissingDataError

LOADERS = [load_steps, load_requests, load_xgboost_predictions]


def test_real_steps_have_their_public_size_and_canonical_models(public_layout: Path) -> None:
    steps = load_steps(public_layout)
    assert len(steps) == 20_112
    assert set(steps["model"]) == {"llama-2-70b", "codellama-34b"}
    pd.testing.assert_frame_equal(steps, steps.sort_values(["experiment_id", "step_id"], ignore_index=True))


def test_real_requests_have_their_public_size(public_layout: Path) -> None:
    requests = load_requests(public_layout)
    assert len(requests) == 151_200
    assert requests["has_error"].sum() == 8_966


def test_real_predictions_are_the_published_test_splits(public_layout: Path) -> None:
    predictions = load_xgboost_predictions(public_layout)
    assert len(predictions) == 24_550
    sizes = predictions.groupby("experiment_id").size()
    assert sizes.to_dict() == published_h2().set_index("experiment_id")["n_test"].to_dict()


def test_the_variable_names_the_folder(public_layout: Path, no_traces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not have_traces()
    monkeypatch.setenv("STEPCAL_DATA", str(public_layout))
    assert have_traces()
    assert len(load_xgboost_predictions()) == 24_550


def test_the_copied_files_are_the_pinned_ones(public_layout: Path) -> None:
    pinned = set(public_files()["sha256"])
    for name in (STEPS_FILE, PREDICTIONS_FILE):
        assert hashlib.sha256((public_layout / name).read_bytes()).hexdigest() in pinned


@pytest.mark.parametrize("load", LOADERS)
def test_missing_traces_say_what_is_missing_and_two_ways_out(load: Any, no_traces: Path, tmp_path: Path) -> None:
    for data, looked in ((None, "STEPCAL_DATA is not set"), (tmp_path, f"{tmp_path} holds no")):
        with pytest.raises(MissingDataError) as refusal:
            load(data)
        message = str(refusal.value)
        assert looked in message
        assert " MB)" in message
        assert "set STEPCAL_DATA" in message
        assert "download=True" in message
    assert not no_traces.exists()


def test_a_folder_that_does_not_exist_is_named(no_traces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingDataError, match="`data` names nowhere, which is not a folder"):
        load_steps("nowhere")
    monkeypatch.setenv("STEPCAL_DATA", "nowhere")
    with pytest.raises(MissingDataError, match="STEPCAL_DATA names nowhere"):
        load_steps()
    assert not have_traces()


@pytest.mark.parametrize(("load", "name"), [(load_steps, STEPS_FILE), (load_xgboost_predictions, PREDICTIONS_FILE)])
def test_a_changed_file_is_refused_with_both_hashes(load: Any, name: str, no_traces: Path, tmp_path: Path) -> None:
    changed = tmp_path / name
    changed.parent.mkdir()
    changed.write_bytes(b"PAR1 something else")
    with pytest.raises(InputError) as refusal:
        load(tmp_path)
    message = str(refusal.value)
    assert message.startswith(f"{changed} has SHA-256 {hashlib.sha256(changed.read_bytes()).hexdigest()}")
    assert "is pinned for inference-sim/inference-sim at 9293b22" in message
    assert "fetch it again" in message


def test_a_changed_request_table_is_refused_with_both_hashes(
    requests: pd.DataFrame, no_traces: Path, tmp_path: Path
) -> None:
    (tmp_path / "requests").mkdir()
    requests.to_parquet(tmp_path / REQUESTS_FILE)
    with pytest.raises(InputError) as refusal:
        load_requests(tmp_path)
    assert content_sha256(validate_requests(requests, source="")) in str(refusal.value)
    assert str(joined_tables()["content_sha256"].item()) in str(refusal.value)


def test_a_download_is_fetched_once_at_the_pinned_commit(
    public_layout: Path, no_traces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def retrieve(url: str, known_hash: str, fname: str, path: Path) -> str:
        asked.append((url, known_hash))
        path.mkdir(parents=True)
        shutil.copy(public_layout / STEPS_FILE, path / fname)
        return str(path / fname)

    monkeypatch.setattr("stepcal.datasets.catalogue.pooch.retrieve", retrieve)
    downloaded = load_steps(download=True)
    pd.testing.assert_frame_equal(downloaded, load_steps(public_layout))
    assert len(load_steps()) == len(downloaded)
    ((url, known_hash),) = asked
    assert url.startswith("https://raw.githubusercontent.com/inference-sim/inference-sim/9293b22762f11d6d95d623ffce")
    assert known_hash == "sha256:7f1276578b10735f88cbf56e0a66b551adc7d633420f7c4e69a164ebe9f4b64d"


@pytest.mark.parametrize(
    ("failure", "error", "said"),
    [
        (ConnectionError("no route"), MissingDataError, "Two ways out: try again with a network, or set STEPCAL_DATA"),
        (ValueError("SHA256 hash of downloaded file does not match."), InputError, "downloaded and discarded"),
    ],
)
def test_a_failed_download_says_why(
    failure: Exception, error: type[Exception], said: str, no_traces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def retrieve(*_: Any, **__: Any) -> str:
        raise failure

    monkeypatch.setattr("stepcal.datasets.catalogue.pooch.retrieve", retrieve)
    with pytest.raises(error, match=said):
        load_requests(download=True)
    assert not no_traces.exists()


def _raw_files(requests: pd.DataFrame, folder: Path, *, wrapped: bool) -> list[Path]:
    """Write the two files of each run in the layout that the join takes for most plausible."""
    files = []
    named = requests.rename(columns={"prompt_tokens": "input_tokens"})
    for experiment_id, table in named.groupby("experiment_id", observed=True):
        parts = {
            f"{experiment_id}.json": table[["index", "arrival_time_us", "input_tokens", "output_tokens"]],
            f"{experiment_id}_ground_truth.json": table[["index", "has_error", "e2e_s", "ttft_s"]].iloc[::-1],
        }
        for name, part in parts.items():
            records = part.astype(object).where(part.notna(), None).to_dict("records")
            files.append(folder / name)
            files[-1].write_text(json.dumps({"version": 1, "requests": records} if wrapped else records))
    return files


@pytest.mark.parametrize("wrapped", [True, False])
def test_joining_the_two_files_gives_the_same_table(requests: pd.DataFrame, wrapped: bool, tmp_path: Path) -> None:
    both = pd.concat([requests, requests.assign(experiment_id="run-b")], ignore_index=True)
    joined = join_requests(_raw_files(both, tmp_path, wrapped=wrapped))
    assert content_sha256(joined) == content_sha256(validate_requests(both, source="requests"))


def test_the_real_table_survives_being_taken_apart_and_joined(public_layout: Path, tmp_path: Path) -> None:
    real = load_requests(public_layout).query("experiment_id.str.contains('reasoning')")
    assert content_sha256(join_requests(_raw_files(real, tmp_path, wrapped=True))) == content_sha256(real)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([{"index": 0, "latency": 3}], "found `index`, `latency`"),
        ({"a": [{}], "b": [{}]}, "found `a`, `b`"),
        ({"meta": 1}, "found `meta`"),
        ([], "found a list"),
        ("text", "found a str"),
        ([{"index": 9, "has_error": False, "e2e_s": 1.0, "ttft_s": 0.1}], "`index` differs at 0, 1, 2"),
    ],
)
def test_another_layout_is_refused_by_the_keys_found(
    content: Any, said: str, requests: pd.DataFrame, tmp_path: Path
) -> None:
    files = _raw_files(requests, tmp_path, wrapped=True)
    files[1].write_text(json.dumps(content))
    with pytest.raises(InputError) as refusal:
        join_requests(files)
    assert str(refusal.value).startswith(str(files[1]))
    assert said in str(refusal.value)


def test_a_file_without_its_partner_or_readable_json_is_refused(requests: pd.DataFrame, tmp_path: Path) -> None:
    files = _raw_files(requests, tmp_path, wrapped=True)
    with pytest.raises(InputError, match=r"need both `run-a\.json` and `run-a_ground_truth\.json`"):
        join_requests(files[:1])
    files[0].write_text("{")
    with pytest.raises(InputError, match=r"run-a\.json is not a readable JSON file"):
        join_requests(files)
    with pytest.raises(InputError, match="No request files were given"):
        join_requests([])
