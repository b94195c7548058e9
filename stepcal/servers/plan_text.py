"""A plan for people: a ranked table, and cost against rate in the terminal and as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence

from stepcal.errors import InputError
from stepcal.servers.capacity import AT_LEAST, AT_MOST, UNKNOWN, rates_per_s
from stepcal.servers.plan import OTHER_SIDE, Choice, cost_of, served_of

WIDTH, HEIGHT = 60, 14
MARK, FRONT = "o", "*"
SIGNS: dict[str | None, str] = {None: "", AT_LEAST: ">= ", AT_MOST: "<= ", UNKNOWN: "? "}
"""In front of a number that is a bound."""


def plan_table(choices: Sequence[Choice], left_out: Sequence[str]) -> str:
    """Return the ranked table, and what was left out."""
    n, w = (max([least, *(2 + len(text(c)) for c in choices)]) for least, text in ((16, _replicas), (30, _rate)))
    lines = [
        f"{'':>3} {'choice':<18}{'replicas':>{n}}{'GPUs':>6}{'price/h':>9}  {'requests/s of one [95%]':<{w}}{'basis':<14}"
    ]
    for i, c in enumerate(choices, start=1):
        price = "-" if c.price_per_h is None else f"{c.price_per_h:.2f}"
        basis = ("extrapolated" if c.is_extrapolated else "calibrated") + (", bound" if c.is_bound else "")
        front = FRONT if c.is_efficient else " "
        name = f"{c.tensor_parallel} x {c.accelerator}"
        lines.append(f"{i:>2}{front} {name:<18}{_replicas(c):>{n}}{c.gpus:>6}{price:>9}  {_rate(c):<{w}}{basis:<14}")
    reasons = sorted({reason for c in choices for reason in c.is_extrapolated})
    lines += [f"  extrapolated: {reason}" for reason in reasons]
    sds = sorted({(c.accelerator, c.log_sd) for c in choices})
    lines.append(
        "  error of a step that the intervals hold (standard deviation): "
        + ", ".join(f"{g} {100 * s:.0f}%" for g, s in sds)
    )
    lines += _bounds(choices)
    lines += [f"  left out: {text}" for text in left_out]
    best = next((c for c in choices if c.capacity.rate_per_s > 0), None)
    if best is not None:
        lines.append(f"  start one replica of the first with: {best.flags}")
        lines += [f"  note on the first: {note}" for note in best.notes]
    return "\n".join(lines)


def _rate(c: Choice) -> str:
    """Rate of one replica with its interval, each with a sign where it is a bound."""
    found = c.capacity
    if not found.rate_per_s:
        return "none"
    ends = (found.rate_per_s, found.bound), (found.low_per_s, found.low_bound), (found.high_per_s, found.high_bound)
    rate, low, high = (f"{SIGNS[bound]}{value:.2f}" for value, bound in ends)
    return f"{rate} [{low}, {high}]"


def _replicas(c: Choice) -> str:
    """Replicas with their interval; each is on the other side of a rate that is a bound."""
    if c.replicas is None:
        return "-"
    found = c.capacity
    ends = (c.replicas, found.bound), (c.replicas_low, found.high_bound), (c.replicas_high, found.low_bound)
    # One replica is enough where it serves at least the rate: there is no smaller number.
    texts = [
        "-" if n is None else f"{'' if n == 1 and bound == AT_LEAST else SIGNS[OTHER_SIDE.get(bound or '')]}{n}"
        for n, bound in ends
    ]
    return f"{texts[0]} [{texts[1]}, {texts[2]}]"


def _bounds(choices: Sequence[Choice]) -> list[str]:
    """What rates with a sign are, and how to ask better."""
    lines = []
    signs = {b for c in choices for b in (c.capacity.bound, c.capacity.low_bound, c.capacity.high_bound)}
    more = max((c.capacity.more_requests or 0 for c in choices), default=0)
    end = f"the search ends at {rates_per_s()[-1]:.2f} requests/s, and the targets are still kept"
    if AT_LEAST in signs:
        lines.append(f"  >=: {end}")
    if UNKNOWN in signs:
        lines.append(f"  ?: {end}, but only in a burst: what is served of a load that lasts is not known")
    if AT_MOST in signs:
        lines.append(
            "  <=: the rate of a burst: a load that lasts keeps the targets at a lower rate, with more replicas"
        )
    if more:
        lines.append(
            f"  too few requests were simulated for the rate: ask with `--requests {more}`, again until no sign is left"
        )
    return lines


def pareto_text(choices: Sequence[Choice]) -> str:
    """Return cost against the rate that is served, in characters; ``*`` where no other choice serves more for less."""
    points = [(cost_of(c), served_of(c), c.is_efficient) for c in _comparable(choices)]
    if not points:
        return "  no choice serves anything within the targets"
    most_cost, most_rate = max(p[0] for p in points), max(p[1] for p in points)
    grid = [[" "] * WIDTH for _ in range(HEIGHT)]
    for cost, rate, is_efficient in sorted(points, key=lambda p: p[2]):
        column = min(int(cost / most_cost * (WIDTH - 1)), WIDTH - 1)
        row = HEIGHT - 1 - min(int(rate / most_rate * (HEIGHT - 1)), HEIGHT - 1)
        grid[row][column] = FRONT if is_efficient else MARK
    what = "price/h" if any(c.price_per_h is not None for c in choices) else "GPUs"
    lines = [f"  requests/s, up to {most_rate:.1f}"]
    lines += ["  |" + "".join(row).rstrip() for row in grid]
    lines.append("  +" + "-" * WIDTH)
    lines.append(f"   {what}, up to {most_cost:g}   ({FRONT}: none serves more for less)")
    return "\n".join(lines)


def _comparable(choices: Sequence[Choice]) -> list[Choice]:
    """Choices that serve something, and have a price where any has."""
    has_prices = any(c.price_per_h is not None for c in choices)
    return [c for c in choices if served_of(c) > 0 and (c.price_per_h is not None or not has_prices)]


def pareto_png(choices: Sequence[Choice]) -> bytes:
    """Return the same as a PNG.

    Raises
    ------
    InputError
        If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("`--plot` needs matplotlib: pip install 'stepcal[report]'.") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for c in _comparable(choices):
        x, y, n = cost_of(c), served_of(c), c.replicas or 1
        axes.errorbar(
            [x],
            [y],
            yerr=[[max(y - n * c.capacity.low_per_s, 0.0)], [max(n * c.capacity.high_per_s - y, 0.0)]],
            fmt="o" if not c.is_extrapolated else "s",
            color="tab:blue" if c.is_efficient else "tab:gray",
            capsize=2,
        )
        axes.annotate(
            f"{c.tensor_parallel} x {c.accelerator}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7
        )
    axes.set_xlabel("Price per hour" if any(c.price_per_h is not None for c in choices) else "GPUs")
    axes.set_ylabel("Requests per second within the targets")
    axes.set_title("Blue: none serves more for less. Squares: extrapolated. Bars: 95% by the model's error", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": ""})
    return buffer.getvalue()
