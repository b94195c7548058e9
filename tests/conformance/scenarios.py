"""The scenarios that are recorded: one file a theme, each scenario with synchronous and with asynchronous scheduling.

A scenario is small enough to follow by hand. What only a mixture of everything brings out is left to seeded random
ones.
"""

from collections.abc import Callable, Iterator

from random_scenarios import random_scenario, random_timed_scenario
from vllm_reference import check_fits

Segments = list[list[int]]

# Contents of text that requests share. What a request has for itself is numbered from 1000 on, by its position.
SYSTEM_PROMPT, DOCUMENT, OTHER_DOCUMENT = 1, 2, 3
ANSWERS = 500  # answer of turn i: ANSWERS + i

N_RANDOM = 40
N_RANDOM_TIMED = 24


def request(
    prompt: int | Segments,
    output_tokens: int,
    *,
    at: int = 0,
    content: int | None = None,
    abort: int | None = None,
    abort_in_flight: int | None = None,
) -> dict:
    """A request; a prompt given as a number is text of its own."""
    return {
        "prompt": prompt,
        "arrival_step": at,
        "output_tokens": output_tokens,
        "output_content": content,
        "abort_step": abort,
        "abort_before_output_of_step": abort_in_flight,
    }


def scenarios(name: str, requests: list[dict], **overrides: int | bool) -> Iterator[dict]:
    """The synchronous and the asynchronous variant of a scenario.

    Parameters
    ----------
    name : str
    requests : list of dict
        From `request`, in order of arrival.
    **overrides
        Configuration values that differ from a roomy engine's. ``usable_blocks`` excludes the null block.
    """
    config = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "num_gpu_blocks": overrides.pop("usable_blocks", 200) + 1,
        "block_size": 16,
        "max_model_len": 1024,
        "enable_prefix_caching": True,
    } | overrides
    described = []
    for index, r in enumerate(sorted(requests, key=lambda r: r["arrival_step"])):
        prompt = r["prompt"] if isinstance(r["prompt"], list) else [[1000 + index, r["prompt"]]]
        in_flight = r["abort_before_output_of_step"]
        described.append(
            {
                "index": index,
                "arrival_step": r["arrival_step"],
                "prompt_segments": prompt,
                "output_tokens": r["output_tokens"],
                "output_content": r["output_content"],
                "abort_step": r["abort_step"],
            }
            | ({"abort_before_output_of_step": in_flight} if in_flight is not None else {})
        )
    for described_request in described:
        check_fits(described_request, config)
    for mode in ("sync", "async"):
        yield {
            "name": f"{mode}-{name}",
            "config": config | {"async_scheduling": mode == "async"},
            "requests": [dict(r) for r in described],
        }


def token_budget() -> Iterator[dict]:
    """Chunked prefill, and what decodes leave of the budget."""
    yield from scenarios("long-prompt-in-chunks", [request(300, 5)], max_num_batched_tokens=64)
    yield from scenarios("chunks-on-block-boundaries", [request(96, 5), request(64, 5)], max_num_batched_tokens=32)
    yield from scenarios("chunks-off-block-boundaries", [request(96, 5), request(64, 5)], max_num_batched_tokens=37)
    yield from scenarios(
        "prompts-fill-budget-exactly", [request(40, 4), request(24, 4), request(10, 4)], max_num_batched_tokens=64
    )
    yield from scenarios(
        "decodes-shrink-chunks",
        [*(request(8, 30) for _ in range(5)), request(100, 4, at=3), request(50, 4, at=4)],
        max_num_batched_tokens=24,
    )
    yield from scenarios(
        "budget-equals-sequence-limit",
        [*(request(3, 20) for _ in range(4)), request(9, 3, at=2), request(1, 2, at=3)],
        max_num_seqs=4,
        max_num_batched_tokens=4,
    )
    yield from scenarios("budget-of-one", [request(5, 3), request(2, 2)], max_num_seqs=1, max_num_batched_tokens=1)
    yield from scenarios(
        "burst-of-prompts", [request(20 + 3 * i, 6) for i in range(12)], max_num_batched_tokens=48, max_num_seqs=12
    )


def sequence_limit() -> Iterator[dict]:
    """Slots, and when they become free."""
    yield from scenarios("one-slot", [request(10, 4), request(12, 3), request(5, 1), request(7, 2)], max_num_seqs=1)
    yield from scenarios("three-slots-ten-requests", [request(10 + i, 3 + i % 4) for i in range(10)], max_num_seqs=3)
    yield from scenarios("all-finish-at-one-step", [request(12, 6) for _ in range(8)], max_num_seqs=4)
    yield from scenarios("one-token-outputs-turn-over", [request(9, 1) for _ in range(9)], max_num_seqs=2)
    yield from scenarios("arrivals-meet-full-slots", [request(16, 7, at=2 * i) for i in range(8)], max_num_seqs=2)


def edge_cases() -> Iterator[dict]:
    """Lengths at the edges: one token, whole blocks, the model's limit."""
    yield from scenarios("one-token-each-way", [request(1, 1)])
    yield from scenarios("one-token-prompts", [request(1, 20), request(1, 1), request(1, 17)])
    yield from scenarios("one-output-token", [request(33, 1), request(16, 1), request(15, 1)])
    for n in (15, 16, 17, 32):
        yield from scenarios(f"prompt-of-{n}", [request(n, 18), request(n, 1)])
    yield from scenarios("up-to-max-model-len", [request(60, 4), request(63, 1), request(1, 63)], max_model_len=64)
    yield from scenarios("outputs-across-blocks", [request(10, 6), request(10, 7), request(10, 8), request(10, 40)])


def block_limit() -> Iterator[dict]:
    """Too few blocks to admit, enough to run."""
    yield from scenarios("last-token-needs-no-block", [request(16, 17)], usable_blocks=2)
    yield from scenarios(
        "head-of-line-blocks-small-ones", [request(40, 20), request(70, 3), request(4, 3)], usable_blocks=6
    )
    yield from scenarios(
        "head-of-line-without-caching",
        [request(40, 20), request(70, 3), request(4, 3)],
        usable_blocks=6,
        enable_prefix_caching=False,
    )
    yield from scenarios(
        "chunk-takes-only-its-blocks", [request(50, 10), request(100, 4)], usable_blocks=9, max_num_batched_tokens=64
    )
    yield from scenarios("exact-fit", [request(32, 1), request(32, 1), request(16, 1), request(16, 1)], usable_blocks=4)


def preemption() -> Iterator[dict]:
    """Running requests that cannot get a block."""
    for caching in (True, False):
        suffix = "with-caching" if caching else "without-caching"
        options = {"enable_prefix_caching": caching}
        yield from scenarios(f"storm-{suffix}", [request(14, 40) for _ in range(6)], usable_blocks=9, **options)
        yield from scenarios(
            f"storm-with-arrivals-{suffix}", [request(20, 30, at=3 * i) for i in range(8)], usable_blocks=8, **options
        )
        yield from scenarios(
            f"all-cross-a-boundary-together-{suffix}", [request(16, 34) for _ in range(5)], usable_blocks=10, **options
        )
        yield from scenarios(
            f"while-prefilling-{suffix}",
            [request(30, 40), request(30, 40), request(120, 5, at=2)],
            usable_blocks=9,
            max_num_batched_tokens=32,
            **options,
        )
        yield from scenarios(f"one-at-a-time-{suffix}", [request(10, 50), request(10, 50)], usable_blocks=4, **options)
    yield from scenarios(
        "resumed-goes-before-new-ones",
        [request(30, 30), request(30, 30), request(30, 30), request(4, 4, at=4), request(4, 4, at=5)],
        usable_blocks=8,
        max_num_seqs=3,
    )
    yield from scenarios(
        "recompute-in-chunks", [request(60, 40), request(60, 40)], usable_blocks=8, max_num_batched_tokens=16
    )
    # The victim's last token is in flight when it is preempted: it finishes from the waiting queue.
    for output_tokens in (2, 3, 4):
        yield from scenarios(
            f"victim-finishes-while-preempted-{output_tokens}",
            [request(15, 20), request(28, output_tokens)],
            usable_blocks=3,
        )
    yield from scenarios(
        "shared-prefix-storm",
        [request([[DOCUMENT, 32], [1000 + i, 5]], 40) for i in range(5)],
        usable_blocks=8,
    )


def prefix_sharing() -> Iterator[dict]:
    """Prefix hits between requests of one step, of neighbouring steps, of another time."""
    for n in (47, 48, 49):
        yield from scenarios(f"same-prompt-of-{n}-in-one-step", [request([[DOCUMENT, n]], 4) for _ in range(3)])
        yield from scenarios(f"same-prompt-of-{n}-later", [request([[DOCUMENT, n]], 4, at=12 * i) for i in range(3)])
    yield from scenarios(
        "shared-prefix-in-one-step", [request([[SYSTEM_PROMPT, 64], [1000 + i, 20]], 6) for i in range(6)]
    )
    yield from scenarios(
        "nested-prefixes",
        [
            request([[SYSTEM_PROMPT, 32], [DOCUMENT, 40], [1000, 9]], 4),
            request([[SYSTEM_PROMPT, 32], [DOCUMENT, 40], [1001, 9]], 4, at=1),
            request([[SYSTEM_PROMPT, 32], [OTHER_DOCUMENT, 40]], 4, at=1),
            request([[SYSTEM_PROMPT, 20], [DOCUMENT, 40]], 4, at=2),
        ],
    )
    yield from scenarios(
        "hit-while-the-first-one-prefills",
        [request([[DOCUMENT, 200]], 4), *(request([[DOCUMENT, 200]], 4, at=i) for i in (1, 2, 3))],
        max_num_batched_tokens=64,
    )
    yield from scenarios(
        "hit-in-the-same-chunked-step",
        [request([[DOCUMENT, 40]], 4), request([[DOCUMENT, 40], [1001, 40]], 4), request([[DOCUMENT, 40]], 4)],
        max_num_batched_tokens=60,
    )
    yield from scenarios(
        "no-caching", [request([[DOCUMENT, 48]], 4, at=i // 2) for i in range(4)], enable_prefix_caching=False
    )
    yield from scenarios(
        "hit-but-no-room-for-the-rest",
        [request([[DOCUMENT, 48]], 2), request(60, 20, at=4), request([[DOCUMENT, 48], [1002, 40]], 3, at=5)],
        usable_blocks=7,
    )


def eviction() -> Iterator[dict]:
    """Free blocks keep their text until they are taken, oldest first, tails before heads."""
    same = [[DOCUMENT, 80]]
    for filler in (16, 70, 90, 105, 120):
        yield from scenarios(
            f"reuse-after-{filler}-other-tokens",
            [request(same, 2), request(filler, 2, at=5), request(same, 2, at=10)],
            usable_blocks=9,
        )
    yield from scenarios(
        "a-hit-refreshes-the-order",
        [
            request([[DOCUMENT, 40]], 2),
            request([[OTHER_DOCUMENT, 40]], 2, at=5),
            request([[DOCUMENT, 40]], 2, at=10),
            request(33, 2, at=15),
            request([[DOCUMENT, 40]], 2, at=20),
            request([[OTHER_DOCUMENT, 40]], 2, at=25),
        ],
        usable_blocks=7,
    )
    yield from scenarios(
        "duplicate-blocks",
        # A prompt of whole blocks recomputes its last one: the same text in two blocks, the older of which is found.
        [
            *(request([[DOCUMENT, 48]], 3 + 2 * i) for i in range(3)),
            request(40, 8, at=12),
            request([[DOCUMENT, 48], [1004, 3]], 3, at=14),
            request([[DOCUMENT, 64]], 3, at=24),
        ],
        usable_blocks=8,
    )
    yield from scenarios(
        "thrashing-documents",
        [request([[DOCUMENT if i % 2 else OTHER_DOCUMENT, 64], [1000 + i, 4]], 3, at=4 * i) for i in range(8)],
        usable_blocks=7,
    )


def multi_turn() -> Iterator[dict]:
    """A later prompt repeats what an earlier request has generated."""
    for answer_tokens in (14, 15, 16, 17, 31, 32, 33):
        first = [[SYSTEM_PROMPT, 17]]
        yield from scenarios(
            f"answer-of-{answer_tokens}",
            [
                request(first, answer_tokens, content=ANSWERS),
                request([*first, [ANSWERS, answer_tokens], [1001, 6]], 4, at=answer_tokens + 6),
            ],
        )
    turns: Segments = [[SYSTEM_PROMPT, 40]]
    requests = []
    for i in range(4):
        turns = [*turns, [1000 + i, 11]]
        requests.append(request([list(s) for s in turns], 21, at=26 * i, content=ANSWERS + i))
        turns = [*turns, [ANSWERS + i, 21]]
    yield from scenarios("four-turns", requests)
    yield from scenarios(
        "four-turns-few-blocks", [*requests, request(50, 40, at=30), request(50, 40, at=60)], usable_blocks=12
    )
    yield from scenarios(
        "next-turn-cuts-the-answer",
        [request([[1000, 20]], 40, content=ANSWERS), request([[1000, 20], [ANSWERS, 22], [1001, 9]], 4, at=48)],
    )
    yield from scenarios(
        "next-turn-while-the-answer-runs",
        [
            request([[1000, 20]], 40, content=ANSWERS),
            *(request([[1000, 20], [ANSWERS, 30], [1001 + i, 9]], 4, at=at) for i, at in enumerate((28, 29, 30, 31))),
        ],
    )
    yield from scenarios(
        "same-question-same-answer",
        [request([[DOCUMENT, 30]], 36, at=5 * i, content=ANSWERS) for i in range(4)]
        + [request([[DOCUMENT, 30], [ANSWERS, 36]], 4, at=60)],
    )


def aborts() -> Iterator[dict]:
    """Clients that go away."""
    others = [request(20, 12), request(25, 12)]
    for step in range(6):
        yield from scenarios(f"before-step-{step}", [*others, request(18, 8, at=1, abort=1 + step)])
        yield from scenarios(f"in-flight-{step}", [*others, request(18, 3, at=1, abort_in_flight=1 + step)])
    yield from scenarios(
        "waiting-behind-full-slots", [*others, request(18, 8, at=1, abort=4), request(9, 3, at=2)], max_num_seqs=2
    )
    yield from scenarios(
        "while-prefilling", [*others, request(150, 8, at=1, abort=3), request(9, 3, at=2)], max_num_batched_tokens=40
    )
    yield from scenarios(
        "in-flight-while-prefilling",
        [*others, request(150, 8, at=1, abort_in_flight=3), request(9, 3, at=2)],
        max_num_batched_tokens=40,
    )
    yield from scenarios("the-only-request", [request(30, 20, abort=4)])
    yield from scenarios("the-only-request-in-flight", [request(30, 20, abort_in_flight=4), request(30, 3, at=7)])
    yield from scenarios("of-the-last-token", [request(30, 3, abort_in_flight=2)])
    yield from scenarios(
        "frees-the-head-of-the-line",
        [request(60, 40, abort=6), request(60, 5, at=1), request(5, 4, at=2)],
        usable_blocks=7,
    )
    yield from scenarios(
        "of-a-preempted-request", [request(15, 40), request(14, 40, abort=22), request(9, 4, at=4)], usable_blocks=4
    )
    yield from scenarios(
        "leaves-its-blocks-cached", [request([[DOCUMENT, 64]], 30, abort=5), request([[DOCUMENT, 64]], 4, at=8)]
    )
    yield from scenarios("of-everything", [request(20 + i, 30, abort=7) for i in range(5)] + [request(10, 4, at=8)])
    yield from scenarios(
        "before-its-last-block-is-known",
        # The token that completes a block is in flight when the request is aborted: the block is not found later.
        [request([[DOCUMENT, 28]], 20, content=ANSWERS, abort=5), request([[DOCUMENT, 28], [ANSWERS, 20]], 4, at=9)],
    )


def idle_gaps() -> Iterator[dict]:
    """The engine runs dry and starts again."""
    for gap in range(6):
        yield from scenarios(f"arrival-{gap}-steps-after-the-last-output", [request(20, 4), request(20, 4, at=3 + gap)])
    yield from scenarios("three-gaps", [request(20, 3, at=40 * i) for i in range(4)])


def random_mixtures() -> Iterator[dict]:
    """Everything at once, by seed."""
    for seed in range(N_RANDOM):
        yield random_scenario(seed)


def groups() -> dict[str, list[dict]]:
    """The scenarios to record, by file."""
    themes: list[Callable[[], Iterator[dict]]] = [
        token_budget,
        sequence_limit,
        edge_cases,
        block_limit,
        preemption,
        prefix_sharing,
        eviction,
        multi_turn,
        aborts,
        idle_gaps,
        random_mixtures,
    ]
    return {theme.__name__: list(theme()) for theme in themes}


def timed(name: str, requests: list[tuple[float, int, int, float | None]], **overrides: int | bool) -> Iterator[dict]:
    """The variants of a scenario on a clock; requests are ``(arrival_us, prompt tokens, output tokens, abort_us)``."""
    for scenario in scenarios(name, [request(prompt, output) for _, prompt, output, _ in requests], **overrides):
        for described, (arrival_us, _, _, abort_us) in zip(scenario["requests"], requests, strict=True):
            del described["arrival_step"], described["abort_step"]
            described.update(arrival_us=arrival_us, abort_us=abort_us)
        scenario["step_time"] = {
            "constant_us": 100.0,
            "per_token_us": 0.25,
            "per_request_us": 0.5,
            "per_kv_token_us": 0.0,
            "per_waiting_us": 0.0,
        }
        yield scenario


def clock() -> Iterator[dict]:
    """Arrivals and aborts between and exactly at the ends of steps."""
    long_run = (0.0, 16, 12, None)  # its steps: 104.5 µs for the prompt, then 100.75 µs each
    for arrival_us in (0.0, 0.5, 104.5, 104.75, 150.0, 205.25, 300.0):
        yield from timed(f"second-arrives-at-{arrival_us}", [long_run, (arrival_us, 20, 3, None)])
    yield from timed("slot-wait", [(0.0, 16, 3, None), (10.0, 16, 3, None), (120.0, 16, 3, None)], max_num_seqs=1)
    yield from timed("abort-in-a-step", [long_run, (50.0, 20, 6, 350.0)])
    # Steps with both: 109 µs for the prompts, then 101.5 µs each. The third one ends at 312 µs.
    yield from timed("abort-at-a-step-end", [long_run, (0.0, 16, 6, 312.0)])
    yield from timed("abort-before-first-schedule", [long_run, (150.0, 20, 6, 160.0)])
    yield from timed("idle-then-arrival", [(0.0, 16, 2, None), (1000.0, 16, 2, None)])
    yield from timed("arrival-while-draining", [(0.0, 16, 3, None), (250.0, 16, 3, None)])


def random_timed() -> Iterator[dict]:
    """Random scenarios on a clock, by seed."""
    for seed in range(N_RANDOM_TIMED):
        yield random_timed_scenario(seed)


def timed_groups() -> dict[str, list[dict]]:
    """The scenarios on a clock to record, by file."""
    return {theme.__name__: list(theme()) for theme in (clock, random_timed)}
