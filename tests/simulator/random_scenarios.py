"""Seeded random scenarios in the recording format, small and adversarial.

One seed gives one scenario, the same on every machine. The recorder plays them on the real vLLM scheduler, the property
tests on the reference and on the fast engine. The configurations are deliberately cramped (few blocks, few slots, small
token budgets), because that is where schedulers differ.
"""

import random

BLOCK_SIZE = 16

# Content ids of one scenario: shared text is small, text of one request is larger, so that they never meet by accident.
_FIRST_PRIVATE_CONTENT = 1_000


def num_tokens(segments: list[list[int]]) -> int:
    """Tokens of a prompt given as ``[[content_id, n_tokens], ...]``."""
    return sum(n for _, n in segments)


def peak_blocks(request: dict, block_size: int = BLOCK_SIZE) -> int:
    """Blocks that a request holds just before it finishes: its last output token never gets a KV slot."""
    kv_tokens = num_tokens(request["prompt_segments"]) + request["output_tokens"] - 1
    return -(-kv_tokens // block_size)


def _prompt_tokens(rng: random.Random) -> int:
    """A prompt length with the edge cases over-represented: 1 token, exact blocks, one off them."""
    kind = rng.random()
    if kind < 0.1:
        return rng.randint(1, 3)
    if kind < 0.35:
        return BLOCK_SIZE * rng.randint(1, 6)
    if kind < 0.45:
        return BLOCK_SIZE * rng.randint(1, 6) + rng.choice((-1, 1))
    if kind < 0.9:
        return rng.randint(4, 90)
    return rng.randint(90, 260)


def _output_tokens(rng: random.Random) -> int:
    kind = rng.random()
    if kind < 0.15:
        return 1
    if kind < 0.25:
        return 2
    if kind < 0.4:
        return BLOCK_SIZE * rng.randint(1, 2) + rng.choice((-1, 0, 1))
    return rng.randint(2, 48)


def _private_segments(rng: random.Random, n_tokens: int, next_content: list[int]) -> list[list[int]]:
    next_content[0] += 1
    return [[next_content[0], n_tokens]]


def _requests(rng: random.Random, n_requests: int) -> list[dict]:
    """Prompts and outputs. Some prompts share a prefix, some are copies, some continue an earlier conversation."""
    next_content = [_FIRST_PRIVATE_CONTENT]
    shared_prefixes = [[content, _prompt_tokens(rng)] for content in range(1, rng.randint(1, 3) + 1)]
    p_shared = rng.choice((0.0, 0.4, 0.9))
    p_copy = rng.choice((0.0, 0.1, 0.3))
    p_next_turn = rng.choice((0.0, 0.2, 0.5))
    p_reused_output = rng.choice((0.0, 0.5, 1.0))
    requests: list[dict] = []
    for index in range(n_requests):
        turns = [r for r in requests if r["output_content"] is not None and num_tokens(r["prompt_segments"]) < 250]
        if turns and rng.random() < p_next_turn:
            # The next turn of a conversation: everything said so far (or a part of the last answer) and a new question.
            previous = rng.choice(turns)
            answered = previous["output_tokens"] if rng.random() < 0.8 else rng.randint(1, previous["output_tokens"])
            segments = [list(s) for s in previous["prompt_segments"]] + [[previous["output_content"], answered]]
            segments += _private_segments(rng, rng.randint(1, 30), next_content)
        elif requests and rng.random() < p_copy:
            segments = [list(s) for s in rng.choice(requests)["prompt_segments"]]
        elif rng.random() < p_shared:
            segments = [list(rng.choice(shared_prefixes))]
            if rng.random() < 0.8:
                segments += _private_segments(rng, rng.randint(1, 40), next_content)
        else:
            segments = _private_segments(rng, _prompt_tokens(rng), next_content)
        output_content = None
        if rng.random() < p_reused_output:
            next_content[0] += 1
            output_content = next_content[0]
            same_prompt = [r["output_content"] for r in requests if r["prompt_segments"] == segments]
            if same_prompt and rng.random() < 0.5:
                output_content = same_prompt[0]  # greedy decoding: the same question, the same answer
        requests.append(
            {
                "index": index,
                "arrival_step": 0,
                "prompt_segments": segments,
                "output_tokens": _output_tokens(rng),
                "output_content": output_content,
                "abort_step": None,
            }
        )
    return requests


def _arrival_steps(rng: random.Random, n_requests: int) -> list[int]:
    """Sorted arrival steps: a burst, a steady stream, a few waves, or sparse with idle gaps."""
    kind = rng.choice(("burst", "stream", "waves", "sparse"))
    if kind == "burst":
        return [0] * n_requests
    if kind == "stream":
        return sorted(rng.randint(0, 3 * n_requests) for _ in range(n_requests))
    if kind == "waves":
        waves = [rng.randint(0, 120) for _ in range(rng.randint(1, 3))]
        return sorted(rng.choice(waves) for _ in range(n_requests))
    return sorted(rng.randint(0, 60 * n_requests) for _ in range(n_requests))


def _config(rng: random.Random, requests: list[dict]) -> dict:
    max_num_seqs = rng.choice((1, 2, 3, 4, 6, 8, 12, 16))
    budget = rng.choice((max_num_seqs, max_num_seqs + 1, 16, 17, 32, 48, 64, 128, 512, 2048))
    needed = [peak_blocks(r) for r in requests]
    kind = rng.random()
    if kind < 0.3:  # as tight as it can be: the largest request just fits alone
        usable_blocks = max(needed) + rng.randint(0, 1)
    elif kind < 0.8:
        usable_blocks = max(needed) + rng.randint(0, max(1, sum(needed) // 3))
    else:
        usable_blocks = sum(needed) + 2
    return {
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max(budget, max_num_seqs),
        "num_gpu_blocks": usable_blocks + 1,  # one more is the null block
        "block_size": BLOCK_SIZE,
        "max_model_len": 1024,
        "enable_prefix_caching": rng.random() < 0.75,
        "async_scheduling": rng.random() < 0.6,
    }


def random_scenario(seed: int) -> dict:
    """A random scenario, without the recorded ``steps`` and ``outcome``.

    Parameters
    ----------
    seed : int

    Returns
    -------
    dict
        ``name``, ``config`` and ``requests`` of the recording format (see ``tests/conformance/README.md``). Every
        request fits into the blocks when alone, so every scenario ends.
    """
    rng = random.Random(seed)
    requests = _requests(rng, rng.choice((2, 3, 5, 8, 12, 20, 30)))
    for request, arrival_step in zip(requests, _arrival_steps(rng, len(requests)), strict=True):
        request["arrival_step"] = arrival_step
    p_abort = rng.choice((0.0, 0.0, 0.15, 0.4))
    for request in requests:
        if rng.random() >= p_abort:
            continue
        when = request["arrival_step"] + rng.choice((0, 1, 2, rng.randint(0, 12), rng.randint(0, 60)))
        if rng.random() < 0.5:
            request["abort_step"] = when
        else:
            request["abort_before_output_of_step"] = when
    return {"name": f"random-{seed}", "config": _config(rng, requests), "requests": requests}


WINDOWS = {"sliding": (8, 16, 17, 32, 33, 48, 64, 100, 128), "chunked": (16, 24, 32, 50, 64, 128)}


def _random_groups(rng: random.Random) -> list[list]:
    """Groups of layers, what is alike side by side, as vLLM makes them where each has one layer."""
    windows = [[kind, rng.choice(WINDOWS[kind])] for kind in rng.choices(("sliding", "sliding", "chunked"), k=3)]
    kinds = windows[: rng.choice((1, 1, 1, 2, 2, 3))]
    if rng.random() < 0.85 or len(kinds) > 2:
        kinds.insert(rng.choice((0, 0, len(kinds))), ["full", 0])
    kinds = [kind for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    counts = [1] + [rng.choice((1, 1, 2, 3)) for _ in kinds[1:]] if len(kinds) > 1 else [1]
    rng.shuffle(counts)
    return [kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]


def most_blocks(kind: str, window: int, n_tokens: int, config: dict, *, as_admitted: bool) -> int:
    """Blocks that a request of `n_tokens` needs at one time in a group at most: to be computed, or to be admitted."""
    blocks = -(-n_tokens // BLOCK_SIZE)
    if kind == "full" or (as_admitted and config["vllm_version"] == "0.19.0"):
        return blocks
    batches = 2 if config["async_scheduling"] and config["vllm_version"] == "0.33.0" else 1
    in_flight = batches * config["max_num_batched_tokens"]
    n = min(window + in_flight - (1 if kind == "sliding" else 0), config["max_model_len"])
    return min(blocks, -(-n // BLOCK_SIZE) + (1 if kind == "sliding" else 0))


def with_groups(scenario: dict, seed: int, version: str = "0.33.0") -> dict:
    """The scenario on a model whose layers differ in what they read, with few blocks.

    Every request fits when alone, by what the release counts for its admission, so every scenario ends.
    """
    rng = random.Random(seed + 7)
    groups = _random_groups(rng)
    config = {**scenario["config"], "vllm_version": version, "kv_groups": groups}
    needed = [
        sum(
            most_blocks(k, w, num_tokens(r["prompt_segments"]) + r["output_tokens"], config, as_admitted=True)
            for k, w in groups
        )
        for r in scenario["requests"]
    ]
    room = rng.choice((0, 1, rng.randint(0, max(1, sum(needed) // 3)), sum(needed)))
    config["num_gpu_blocks"] = max(needed) + 1 + room
    return {**scenario, "name": f"groups-{scenario['name']}", "config": config}


def with_policies(scenario: dict, seed: int) -> dict:
    """The scenario with priorities, with a threshold for long prefills, or with both; some without chunked prefill."""
    rng = random.Random(seed + 11)
    config, requests = dict(scenario["config"]), [dict(r) for r in scenario["requests"]]
    kind = rng.choice(("priority", "threshold", "both", "both"))
    if kind != "threshold":
        config["scheduling_policy"] = "priority"
    if kind != "priority":
        threshold = rng.choice((1, 2, 5, 8, 15, 16, 17, 24, 32, 33, 48, 64, 100, 300))
        config["long_prefill_token_threshold"] = threshold
        if rng.random() < 0.5:  # a few long prompts take all of it
            budget = rng.choice((threshold, threshold + 1, 2 * threshold, 3 * threshold, 3 * threshold + 5))
            config["max_num_batched_tokens"] = max(config["max_num_seqs"], budget)
    levels = rng.choice(((0,), (0, 1), (-1, 0, 0, 0, 1), range(-3, 4), range(100)))
    arrivals = rng.choice(("own", "own", "own", "equal", "any"))
    for request in requests:
        if rng.random() < 0.9:  # others say nothing: 0
            request["priority"] = rng.choice(levels)
        if arrivals != "own":
            request["arrival_time"] = 0.0 if arrivals == "equal" else float(rng.randint(0, 5))
    if rng.random() < 0.15:  # a whole prompt has to fit into a step
        config["enable_chunked_prefill"] = False
        longest = max(num_tokens(r["prompt_segments"]) + r["output_tokens"] for r in requests)
        config["max_model_len"] = longest + rng.choice((0, 1, 100))
        config["max_num_batched_tokens"] = max(config["max_model_len"], config["max_num_seqs"])
        if "long_prefill_token_threshold" in config:  # no more than vLLM takes
            config["long_prefill_token_threshold"] = min(threshold, longest)
    return {**scenario, "name": f"policies-{scenario['name']}", "config": config, "requests": requests}


def random_timed_scenario(seed: int) -> dict:
    """A random scenario on a clock: arrivals and aborts in microseconds, and an affine step time.

    Parameters
    ----------
    seed : int

    Returns
    -------
    dict
        As `random_scenario`, but requests have ``arrival_us`` and ``abort_us`` in place of the steps, and
        ``step_time`` holds the coefficients of ``constant_us + per_token_us * new tokens + per_request_us * rows +
        per_kv_token_us * KV tokens + per_waiting_us * waiting requests``. All times are multiples of 1/64 µs, so that
        sums are exact in floating point.
    """
    rng = random.Random(~seed)
    scenario = random_scenario(seed)
    scenario["name"] = f"random-timed-{seed}"
    mean_step_us = 64.0
    scenario["step_time"] = {
        "constant_us": mean_step_us,
        "per_token_us": rng.choice((0.0, 0.25, 1.5)),
        "per_request_us": rng.choice((0.0, 0.5, 2.0)),
        "per_kv_token_us": rng.choice((0.0, 1 / 64, 1 / 16)),
        "per_waiting_us": rng.choice((0.0, 0.125)),
    }
    for request in scenario["requests"]:
        arrival_step = request.pop("arrival_step")
        abort_step = request.pop("abort_step")
        abort_in_flight = request.pop("abort_before_output_of_step", None)
        # A third of the arrivals fall exactly on a multiple of the constant, where ties with step ends are likely.
        request["arrival_us"] = arrival_step * mean_step_us + rng.choice((0.0, rng.randint(0, 63) * 1.0, 0.015625))
        request["abort_us"] = None
        abort_at = abort_step if abort_step is not None else abort_in_flight
        if abort_at is not None:
            request["abort_us"] = (abort_at + 1) * mean_step_us + rng.randint(0, 63)
    scenario["requests"].sort(key=lambda r: (r["arrival_us"], r["index"]))
    for index, request in enumerate(scenario["requests"]):
        request["index"] = index
    return scenario
