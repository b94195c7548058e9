"""Jobs in this process, in two, and on a real Dask cluster of two processes give the same bits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from stepcal.errors import InputError
from stepcal.parallel import run_jobs
from stepcal.servers.coefficient_file import load_known
from stepcal.servers.demo import DEMO_SERVER
from stepcal.servers.load import PlannedLoad
from stepcal.servers.plan import Question, plan
from stepcal.servers.targets import goal_of


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    distributed = pytest.importorskip("distributed", reason="pip install 'stepcal[dask]'")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
    ) as local:
        yield local.scheduler_address


def test_a_plan_is_the_same_here_in_two_processes_and_on_a_cluster(cluster: str) -> None:
    options = {k: v for k, v in DEMO_SERVER.items() if k not in ("accelerator", "tensor_parallel_size", "kv_blocks")}
    load = PlannedLoad.of_lengths(300, 40, n_requests=150)
    question = Question(options, load, goal_of(["tpot.mean<=20ms"]), None, {})
    model, gpus = load_known("default"), ["h100-sxm", "l40s"]
    here = plan(question, model, gpus=gpus, degrees=[1, 2])
    assert plan(question, model, gpus=gpus, degrees=[1, 2], jobs=2) == here
    assert plan(question, model, gpus=gpus, degrees=[1, 2], dask=cluster) == here


def test_results_come_in_the_order_of_the_items(cluster: str) -> None:
    items = list(np.linspace(0.1, 9.7, 23))
    assert run_jobs(np.log, items, dask=cluster) == run_jobs(np.log, items) == [np.log(x) for x in items]


def test_a_cluster_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr("stepcal.parallel.CONNECT_S", 1.0)
    with pytest.raises(InputError, match="no Dask scheduler answers there"):
        run_jobs(np.log, [1.0], dask="tcp://127.0.0.1:9")
