"""``stepcal calibrate``: what one server's request logs say of the parameters, with the shipped model as prior.

The log is sent again in the simulator (closed loop), and over blocks of time
``sum((log predicted - log measured)^2 / sigma^2) + sum((log value - log prior)^2 / tau^2)`` is minimised.
`sigma` holds the error that the model is expected to keep and the noise of a block's mean. A parameter whose spread the data
do not at least halve is held by its prior and said to be; intervals hold what the others might be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares
from threadpoolctl import threadpool_limits

from stepcal.errors import InputError
from stepcal.servers.log import WHOLE, ServedLog
from stepcal.servers.posterior import Belief, draw
from stepcal.servers.replay import replayed_latencies_s, with_values
from stepcal.specs.deployment import Deployment
from stepcal.step_time.coefficients import StepTimeModel
from stepcal.step_time.physical_parameters import LearnedParameter
from stepcal.threads import each
from stepcal.units import MS_PER_S, BoolArray, FloatArray, IntArray

TRAIN_SHARE, VALIDATION_SHARE = 0.6, 0.2
"""Temporal split of each run, as the study's: fitted, looked at while choosing, judged."""
BLOCKS = 4
"""Blocks of time that each stage's training part is cut into: a mean of each is one figure."""
SMALLEST_BLOCK = 8
"""Requests below which a block says nothing."""
MODEL_LOG_SD = {"tpot": 0.01, "ttft": 0.05}
"""Error that the model is expected to keep on a block's mean, as in `stepcal.calibration.closed_loop`."""
ARRIVALS_LOG_SD = 0.01
"""What other Poisson arrivals change of a stage's mean, for logs whose own arrivals are not known."""
QUEUED_TTFT_STEPS = 20.0
"""From this many steps on the first token waits for a queue, where 1% of step time is far more than 1% of the wait."""
QUEUED_LOG_SD = {"tpot": 0.02, "ttft": 0.3}
DETERMINED_SHRINKAGE = 0.5
"""A parameter is determined where its spread given the data is below this share of its prior's."""
TAIL = 0.025
"""Probability beyond each end of a 95% interval."""
DIFFERENCE_STEP = 0.1
"""Largest step of central differences in the logarithm; half the prior's spread where that is less. Single requests that
change batches jitter a block's mean by 1e-4: a step of 4e-3 turned that into information that the data do not hold."""
SMALL_CHANGE = 1e-3
MISSING_RESIDUAL = 30.0
MAX_EVALUATIONS = 12
CONVERGED = 1e-3


Vector = Callable[[FloatArray], FloatArray]


@dataclass(frozen=True)
class Block:
    """Requests of one stage in one span of time, and the means measured over them."""

    log: int
    chosen: IntArray
    means: dict[str, float]
    log_sd: dict[str, float]


@dataclass(frozen=True)
class ServerCalibration:
    """What was learned of one server.

    Attributes
    ----------
    coefficients : StepTimeModel
        Prior with what was learned in it.
    parameters : tuple of LearnedParameter
        All that could be learned; bounds and priors.
    determined : tuple of str
        Those that the data determine; the prior holds the others.
    draws : ndarray, shape (n_draws, n_parameters)
        Logarithms of the parameters, drawn given data and prior.
    shrinkage : dict
        Spread given the data over the prior's, by name.
    residual_log_sd : dict
        What remains of ``log predicted - log measured`` on the training blocks, by metric.
    inflation : float
        Factor on the covariance: residuals beyond what was expected widen the intervals, none narrow them.
    n_blocks : int
    """

    coefficients: StepTimeModel
    parameters: tuple[LearnedParameter, ...]
    determined: tuple[str, ...]
    draws: FloatArray
    shrinkage: dict[str, float]
    residual_log_sd: dict[str, float]
    inflation: float
    n_blocks: int

    def interval(self, name: str) -> tuple[float, float]:
        """95% interval of a parameter."""
        i = [p.name for p in self.parameters].index(name)
        low, high = np.exp(np.quantile(self.draws[:, i], [TAIL, 1 - TAIL]))
        return float(low), float(high)


def training_mask(log: ServedLog, share: float = TRAIN_SHARE) -> BoolArray:
    """Return which requests arrive in the first share of a log and end before the rest begins.

    Raises
    ------
    InputError
        If single requests are not at hand.
    """
    if log.e2e_s is None:
        raise InputError(
            f"`{log.run}` has summaries only; a calibration needs single requests. `stepcal ingest` reads them "
            "from the load generator's own files."
        )
    n = len(log.requests)
    n_train = round(share * n)
    arrival = log.requests.arrival_s
    ended = arrival + np.where(np.isnan(log.e2e_s), log.timeout_s, log.e2e_s)
    boundary = arrival[n_train] if n_train < n else np.inf
    return (np.arange(n) < n_train) & (ended <= boundary)


def blocks_of(logs: Sequence[ServedLog], masks: Sequence[BoolArray], n_blocks: int = BLOCKS) -> list[Block]:
    """Cut the chosen requests of logs into blocks of time within each stage, and take the means of each."""
    result = []
    for i, (log, mask) in enumerate(zip(logs, masks, strict=True)):
        if log.e2e_s is None or log.ttft_s is None:
            result += _summary_blocks(i, log, mask)
            continue
        done = mask & ~np.isnan(log.e2e_s)
        for stage in np.unique(log.stage):
            rows = np.flatnonzero(done & (log.stage == stage))
            parts = np.array_split(rows, min(n_blocks, max(len(rows) // SMALLEST_BLOCK, 1)))
            result += [_block(i, log, chosen) for chosen in parts if len(chosen) >= SMALLEST_BLOCK]
    return result


def _summary_blocks(i: int, log: ServedLog, mask: BoolArray) -> list[Block]:
    """A block a stage whose requests are all chosen, from the summaries of a log without single requests."""
    known = log.summaries[log.summaries["statistic"] == "mean"].set_index(["split", "metric"])["value"]
    stages = np.unique(log.stage)
    result = []
    for stage in stages:
        rows = np.flatnonzero(log.stage == stage)
        split = f"stage {stage}" if len(stages) > 1 else WHOLE
        if not mask[rows].all() or (split, "tpot") not in known.index:
            continue
        names = [name for name in MODEL_LOG_SD if (split, name) in known.index]
        means = {name: float(known[split, name]) / MS_PER_S for name in names}
        sds = {name: float(np.hypot(MODEL_LOG_SD[name], ARRIVALS_LOG_SD)) for name in names}
        result.append(Block(i, rows, means, sds))
    return result


def _block(i: int, log: ServedLog, chosen: IntArray) -> Block:
    values = block_values(log, chosen, log.e2e_s, log.ttft_s)
    means = {name: float(v.mean()) for name, v in values.items()}
    is_queued = "ttft" in means and means["ttft"] > QUEUED_TTFT_STEPS * means["tpot"]
    expected = QUEUED_LOG_SD if is_queued else MODEL_LOG_SD
    noise = {name: float(v.std() / v.mean() / np.sqrt(len(v))) for name, v in values.items()}
    # The replay has the same arrivals and lengths, so what varies between requests is not all noise: a tenth of it is.
    sds = {name: float(np.hypot(expected[name], 0.1 * noise[name])) for name in means}
    return Block(i, chosen, means, sds)


def block_values(
    log: ServedLog, chosen: IntArray, e2e_s: FloatArray | None, ttft_s: FloatArray | None
) -> dict[str, FloatArray]:
    """Figures of requests that a block is judged by: time per output token, and TTFT where the client streamed."""
    if e2e_s is None or ttft_s is None:
        return {}
    e2e, ttft = e2e_s[chosen], ttft_s[chosen]
    tokens = np.asarray(log.requests.output_tokens, dtype=float)[chosen]
    if np.isnan(ttft).all():
        return {"tpot": e2e / tokens}  # without streaming: all of it, over all tokens
    gaps = np.maximum(tokens - 1, 1)
    known = ~np.isnan(ttft) & ~np.isnan(e2e) & (tokens > 1)
    return {"tpot": ((e2e - ttft) / gaps)[known], "ttft": ttft[~np.isnan(ttft)]}


def residuals(
    logs: Sequence[ServedLog], blocks: Sequence[Block], coefficients: StepTimeModel, *, workers: int = 1
) -> FloatArray:
    """Whitened log errors of the blocks' means, in the order of blocks and of their metrics."""
    simulated = each(lambda log: replayed_latencies_s(log, coefficients), logs, workers=workers)
    rows: list[float] = []
    for block in blocks:
        log, (e2e, ttft) = logs[block.log], simulated[block.log]
        is_unary = "ttft" not in block.means
        predicted = block_values(log, block.chosen, e2e, np.full_like(ttft, np.nan) if is_unary else ttft)
        for name, mean in block.means.items():
            here = predicted.get(name, np.zeros(0))
            here = here[~np.isnan(here)]
            known = here.size > 0 and here.mean() > 0
            rows.append(float(np.log(here.mean() / mean) / block.log_sd[name]) if known else MISSING_RESIDUAL)
    return np.array(rows)


@threadpool_limits.wrap(limits=1)  # type: ignore[untyped-decorator]
def calibrate_server(
    logs: Sequence[ServedLog],
    prior: StepTimeModel,
    parameters: Sequence[LearnedParameter],
    *,
    masks: Sequence[BoolArray] | None = None,
    n_blocks: int = BLOCKS,
    seed: int = 0,
    workers: int = 1,
) -> ServerCalibration:
    """Learn of one server's parameters what its logs determine.

    Parameters
    ----------
    logs : sequence of ServedLog
        Runs of the same server, or of servers that share the parameters.
    prior : StepTimeModel
        The shipped model; where the fit starts and what is left where the data say nothing.
    parameters : sequence of LearnedParameter
        Bounds and prior spreads.
    masks : sequence of ndarray of bool, optional
        Requests to learn from; by default the first 60% of each run.
    n_blocks : int
    seed : int
        Of the draws.
    workers : int
        Threads that simulate; their number changes no bit of the result.

    Returns
    -------
    ServerCalibration

    Raises
    ------
    InputError
        If there is nothing to learn from.
    """
    chosen = [training_mask(log) for log in logs] if masks is None else list(masks)
    blocks = blocks_of(logs, chosen, n_blocks)
    if not blocks:
        raise InputError(
            f"No block of {SMALLEST_BLOCK} completed requests in the training part: there is nothing to learn from. Give a "
            "longer run."
        )
    relevant = parameters_that_act(
        [log.deployment for log in logs], prior, parameters, has_api=any(not log.is_engine_side for log in logs)
    )
    problem = _Problem(logs, blocks, prior, tuple(relevant), workers)
    start = np.log([prior.values[p.name] for p in relevant])
    fitted = _fit(problem.residuals, problem.jacobian, start, problem.spread, relevant)
    final = problem.residuals(fitted)
    inflation = max(1.0, float(final @ final) / len(final))
    wider = float(np.sqrt(inflation))
    draws = draw(
        Belief.of(relevant, start),
        lambda x: problem.residuals(x) / wider,
        fitted,
        final / wider,
        problem.jacobian(fitted) / wider,
        seed=seed,
    )
    shrinkage = dict(zip(problem.names, (draws.std(axis=0) / problem.spread).tolist(), strict=True))
    return ServerCalibration(
        coefficients=with_values(prior, problem.values(fitted)),
        parameters=tuple(relevant),
        determined=tuple(n for n in problem.names if shrinkage[n] < DETERMINED_SHRINKAGE),
        draws=draws,
        shrinkage=shrinkage,
        residual_log_sd=_residual_log_sd(blocks, final),
        inflation=inflation,
        n_blocks=len(blocks),
    )


@dataclass(frozen=True)
class _Problem:
    """What the optimiser sees: whitened residuals by the logarithms of the parameters that act."""

    logs: Sequence[ServedLog]
    blocks: Sequence[Block]
    prior: StepTimeModel
    parameters: tuple[LearnedParameter, ...]
    workers: int

    @property
    def names(self) -> list[str]:
        return [p.name for p in self.parameters]

    @property
    def spread(self) -> FloatArray:
        return np.array([p.prior_log_sd for p in self.parameters], dtype=np.float64)

    def values(self, x: FloatArray) -> dict[str, float]:
        return dict(zip(self.names, np.exp(x).tolist(), strict=True))

    def residuals(self, x: FloatArray) -> FloatArray:
        return residuals(self.logs, self.blocks, with_values(self.prior, self.values(x)), workers=self.workers)

    def jacobian(self, x: FloatArray) -> FloatArray:
        """Central differences, wide enough for what a simulation jitters."""
        sizes = np.minimum(DIFFERENCE_STEP, self.spread / 2)
        pairs = [(self.residuals(x + row), self.residuals(x - row), 2 * row.max()) for row in np.diag(sizes)]
        return np.column_stack([(up - down) / width for up, down, width in pairs])


def parameters_that_act(
    deployments: Sequence[Deployment],
    prior: StepTimeModel,
    parameters: Sequence[LearnedParameter],
    *,
    has_api: bool = True,
) -> list[LearnedParameter]:
    """Return the parameters that change anything: no collectives without ranks, no mixtures in a dense model.

    Parameters
    ----------
    deployments : sequence of Deployment
    prior : StepTimeModel
    parameters : sequence of LearnedParameter
    has_api : bool
        Whether latencies hold the API server's time.
    """
    compiled = [prior.compile(deployment) for deployment in deployments]
    result = []
    for p in parameters:
        if p.name not in prior.values:
            continue
        moved = with_values(prior, {p.name: prior.values[p.name] * (1 + SMALL_CHANGE)})
        overheads = has_api and moved.api_overheads_us() != prior.api_overheads_us()
        same = all(_same(moved.compile(d), c) for d, c in zip(deployments, compiled, strict=True))
        if overheads or not same:
            result.append(p)
    return result


def _same(a: object, b: object) -> bool:
    same_as = getattr(a, "same_as", None)
    return bool(same_as(b)) if same_as is not None else False


def _fit(
    data: Vector, jacobian: Vector, start: FloatArray, spread: FloatArray, parameters: Sequence[LearnedParameter]
) -> FloatArray:
    """Most probable logarithms of the parameters."""
    low, high = np.log([[p.low for p in parameters], [p.high for p in parameters]])
    solution = least_squares(
        lambda x: np.concatenate([data(x), (x - start) / spread]),
        np.clip(start, low + 1e-9, high - 1e-9),
        jac=lambda x: np.vstack([jacobian(x), np.diag(1.0 / spread)]),
        bounds=(low, high),
        x_scale=spread,
        xtol=CONVERGED,
        ftol=CONVERGED,
        max_nfev=MAX_EVALUATIONS,
    )
    return solution.x


def _residual_log_sd(blocks: Sequence[Block], whitened: FloatArray) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    position = 0
    for block in blocks:
        for name in block.means:
            found.setdefault(name, []).append(float(whitened[position]) * block.log_sd[name])
            position += 1
    return {name: float(np.sqrt(np.mean(np.square(v)))) for name, v in found.items()}
