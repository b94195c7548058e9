"""``stepcal plan``: which GPUs, how many ranks and replicas serve a load within its targets, and at what price."""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from stepcal.errors import InputError
from stepcal.experiments.options import Served, deployment_from
from stepcal.parallel import run_jobs
from stepcal.servers.capacity import AT_LEAST, AT_MOST, UNKNOWN, Capacity, Server, capacity, check_goal
from stepcal.servers.coefficient_file import KnownModel
from stepcal.servers.load import PlannedLoad
from stepcal.servers.targets import Goal
from stepcal.servers.validity import deployment_outside
from stepcal.specs.deployment import Deployment
from stepcal.specs.hardware import accelerators
from stepcal.specs.kv_cache import AUTO

DEGREES = (1, 2, 4, 8)
OTHER_SIDE = {AT_LEAST: AT_MOST, AT_MOST: AT_LEAST, UNKNOWN: UNKNOWN}
"""What a number of replicas is where the rate of one is a bound."""


@dataclass(frozen=True)
class Choice:
    """One row of a plan.

    Attributes
    ----------
    accelerator : str
    tensor_parallel : int
    replicas : int or None
        That serve the asked rate; None where no rate was asked for.
    replicas_low, replicas_high : int or None
        With the model's error to either side.
    replicas_bound : {"at least", "at most", "unknown"} or None
        What `replicas` is where the capacity is a bound: the other side of it.
    is_bound : bool
        Whether a rate of the capacity is the end of the search, or of too short a sample.
    gpus : int
        Of all replicas.
    price_per_h : float or None
    capacity : Capacity
        Of one replica.
    price_per_million_requests : float or None
        At the largest rate.
    is_extrapolated : tuple of str
        What the coefficients were not calibrated on; empty where they were.
    log_sd : float
        Error of the model that the interval is made of.
    flags : str
        Command that starts one replica.
    notes : tuple of str
        What was assumed of this server, and which of its kernels have no table.
    is_efficient : bool
        Whether no other choice serves more for less.
    """

    accelerator: str
    tensor_parallel: int
    replicas: int | None
    replicas_low: int | None
    replicas_high: int | None
    gpus: int
    price_per_h: float | None
    capacity: Capacity
    price_per_million_requests: float | None
    is_extrapolated: tuple[str, ...]
    log_sd: float
    flags: str
    notes: tuple[str, ...] = ()
    replicas_bound: str | None = None
    is_bound: bool = False
    is_efficient: bool = False

    def row(self) -> dict[str, Any]:
        """Return for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Question:
    """What is planned for.

    Attributes
    ----------
    options : dict
        Model and limits of the server, without GPU and degree.
    load : PlannedLoad
    goal : Goal
    rate_per_s : float or None
        To be served in all; None asks for the largest rate of one replica.
    prices_per_h : dict
        Of one GPU by name.
    """

    options: Mapping[str, Any]
    load: PlannedLoad
    goal: Goal
    rate_per_s: float | None
    prices_per_h: Mapping[str, float]


def read_prices(path: Path) -> dict[str, float]:
    """Read a price table: CSV with `accelerator` and `price_per_h` of one GPU.

    Raises
    ------
    InputError
        If it is no such table, or a GPU is unknown, or a price not positive.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = [(row["accelerator"], float(row["price_per_h"])) for row in csv.DictReader(stream)]
    except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(
            f"{path} is no price table ({type(error).__name__}: {error}). It is CSV with the columns `accelerator` and "
            "`price_per_h` (one GPU, any currency)."
        ) from None
    for name, price in rows:
        if name not in accelerators():
            raise InputError(f"{path}: unknown accelerator `{name}`. Known: {', '.join(accelerators())}.")
        if not 0 < price < math.inf:
            raise InputError(f"{path}: the price of `{name}` is {price}; it must be above 0.")
    return dict(rows)


def plan(
    question: Question,
    model: KnownModel,
    *,
    gpus: Sequence[str] = (),
    degrees: Sequence[int] = DEGREES,
    jobs: int = 1,
    dask: str | None = None,
) -> tuple[list[Choice], list[str]]:
    """Rank what would serve a load.

    Parameters
    ----------
    question : Question
    model : KnownModel
    gpus : sequence of str
        By default all that ship.
    degrees : sequence of int
    jobs : int
        Processes; their number changes no bit of the result.
    dask : str, optional
        Address of a Dask scheduler that takes their place.

    Returns
    -------
    choices : list of Choice
        Cheapest first (by price, or number of GPUs without one), or without an asked rate the largest rate a price first.
        Choices that serve nothing within the targets come last.
    left_out : list of str
        What does not fit, and why.

    Raises
    ------
    InputError
        If no GPU and degree fits, or no request has what a target is on.
    """
    check_goal(question.goal, question.load)
    candidates, left_out = [], []
    for gpu in gpus or tuple(accelerators()):
        for degree in degrees:
            try:
                served = deployment_from({**question.options, "accelerator": gpu, "tensor_parallel_size": degree})
                Server.of(model.coefficients, served.deployment)
            except InputError as error:
                left_out.append(f"{degree} x {gpu}: {error}")
                continue
            candidates.append(served)
    if not candidates:
        raise InputError("Nothing to plan with: no GPU and degree fits. " + (left_out[0] if left_out else ""))
    find = functools.partial(_capacity, question=question, model=model)
    found = run_jobs(find, [served.deployment for served in candidates], jobs=jobs, dask=dask)
    choices = [_choice(s, c, question, model) for s, c in zip(candidates, found, strict=True)]
    choices.sort(key=lambda c: _rank(c, question))
    return _with_front(choices), left_out


def _capacity(deployment: Deployment, question: Question, model: KnownModel) -> Capacity:
    server = Server.of(model.coefficients, deployment)
    return capacity(server, question.load, question.goal, log_sd=model.log_sd_on(deployment.accelerator.name))


def _choice(served: Served, found: Capacity, question: Question, model: KnownModel) -> Choice:
    deployment = served.deployment
    rate, gpu = question.rate_per_s, deployment.accelerator.name

    def replicas(of_one: float) -> int | None:
        return None if rate is None or of_one <= 0 else math.ceil(rate / of_one)

    needed = replicas(found.rate_per_s)
    n_gpus = deployment.tensor_parallel * (needed or 1)
    price = question.prices_per_h.get(gpu)
    price_per_h = None if price is None else price * n_gpus
    a_rate = None if found.rate_per_s <= 0 or price is None else price * deployment.tensor_parallel / found.rate_per_s
    return Choice(
        accelerator=gpu,
        tensor_parallel=deployment.tensor_parallel,
        replicas=needed,
        replicas_low=replicas(found.high_per_s),
        replicas_high=replicas(found.low_per_s),
        gpus=n_gpus,
        price_per_h=price_per_h,
        capacity=found,
        price_per_million_requests=None if a_rate is None else a_rate / 3600.0 * 1e6,
        is_extrapolated=tuple(deployment_outside(deployment, model.validity)),
        log_sd=model.log_sd_on(gpu),
        flags=launch_command(deployment),
        notes=(*served.notes, *model.coefficients.notes(deployment)),
        replicas_bound=None if needed is None else OTHER_SIDE.get(found.bound or ""),
        is_bound=found.is_bound,
    )


def _rank(choice: Choice, question: Question) -> tuple[float, ...]:
    serves = choice.capacity.rate_per_s > 0
    cost = choice.price_per_h if choice.price_per_h is not None else float(choice.gpus)
    if question.rate_per_s is None:
        cost /= max(choice.capacity.rate_per_s, 1e-9)
    is_unpriced = bool(question.prices_per_h) and choice.price_per_h is None
    return (float(not serves), float(is_unpriced), cost, -choice.capacity.rate_per_s)


def _with_front(choices: Sequence[Choice]) -> list[Choice]:
    """Mark the choices that no other one beats in both cost and the rate that all replicas serve.

    Where some have a price, those without one are not compared.
    """
    has_prices = any(c.price_per_h is not None for c in choices)
    compared = [c for c in choices if served_of(c) > 0 and (c.price_per_h is not None or not has_prices)]
    points = [(cost_of(c), served_of(c)) for c in compared]
    efficient = [
        not any(o <= cost and s >= served and (o, s) != (cost, served) for o, s in points) for cost, served in points
    ]
    marked = {id(c): e for c, e in zip(compared, efficient, strict=True)}
    return [replace(c, is_efficient=marked.get(id(c), False)) for c in choices]


def cost_of(choice: Choice) -> float:
    """Price per hour of all replicas, or the number of GPUs where there is none."""
    return float(choice.gpus) if choice.price_per_h is None else choice.price_per_h


def served_of(choice: Choice) -> float:
    """Requests a second that all replicas serve within the targets."""
    return choice.capacity.rate_per_s * (choice.replicas or 1)


def launch_command(deployment: Deployment) -> str:
    """Return the command that starts a server like this one."""
    s = deployment.limits
    parts = [
        f"vllm serve {deployment.architecture.name}",
        f"--tensor-parallel-size {deployment.tensor_parallel}",
        f"--max-num-seqs {s.max_num_seqs}",
        f"--max-num-batched-tokens {s.max_num_batched_tokens}",
        f"--max-model-len {s.max_model_len}",
        f"--block-size {s.block_size}",
    ]
    parts += [] if deployment.kv_cache_dtype == AUTO else [f"--kv-cache-dtype {deployment.kv_cache_dtype}"]
    parts += [] if s.enable_prefix_caching else ["--no-enable-prefix-caching"]
    return " ".join(parts)
