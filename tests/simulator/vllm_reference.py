"""A slow reference of vLLM's engine loop, scheduler and KV block pool, written to be read.

It knows nothing of the package under test and nothing of vLLM: plain lists and dicts, one token at a time. It
reproduces every recording of the real thing (``tests/conformance``) step for step; the fast engine is compared with
it on random workloads. One rule carries most of the rest: *a request needs new tokens computed until its KV cache has
caught up with the tokens that it knows, and the step in which it catches up samples its next token*. Prefill, chunks
of it, decode and recomputation after a preemption are the same thing.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

# A token is named by what it is: (content id, offset in that content). Equal names are equal tokens.
Token = tuple[object, int]

# Preemptions and empty steps without one token in between from which on a scenario counts as one without end.
MOST_VAIN_EVENTS = 1000


class EndlessError(RuntimeError):
    """Requests preempt each other for ever, or wait for ever, as vLLM's can with few blocks."""


def num_tokens(segments: Iterable[Iterable[int]]) -> int:
    """Tokens of a prompt given as ``[[content_id, n_tokens], ...]``."""
    return sum(n for _, n in segments)


# --------------------------------------------------------------------------------------------------------------------
# What differs between releases of vLLM
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rules:
    """Rules that came with a release."""

    admits_whole_sequences: bool = True
    takes_unfindable_blocks_first: bool = True
    # A lone request, waiting or running, is not held to `long_prefill_token_threshold`.
    spares_lone_requests: bool = False
    # With priorities: the step goes on behind a victim wherever it stood, and behind a request that preempted itself.
    # Before, the request behind a victim that was passed over (its last token in flight) missed its turn, and a request
    # that preempted itself ended the step for all behind it.
    keeps_place_after_preemption: bool = False
    # Of layers that read a window (`reference_groups`):
    knows_that_windows_slide: bool = True  # admission counts a window with what it holds at most at one time
    counts_all_batches_in_flight: bool = False  # beside the window, the tokens of all batches in flight, not of one
    waits_for_windows_in_flight: bool = False  # what a window leaves behind is kept until the step in flight has ended
    keeps_windows_where_prompts_end: bool = False  # others find a sliding window there only


RULES = {
    "0.15.1": Rules(admits_whole_sequences=False, takes_unfindable_blocks_first=False),
    "0.19.0": Rules(takes_unfindable_blocks_first=False, knows_that_windows_slide=False),
    "0.24.0": Rules(),
    "0.33.0": Rules(
        spares_lone_requests=True,
        keeps_place_after_preemption=True,
        counts_all_batches_in_flight=True,
        waits_for_windows_in_flight=True,
        keeps_windows_where_prompts_end=True,
    ),
}
"""By recorded release."""


# --------------------------------------------------------------------------------------------------------------------
# Requests
# --------------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Request:
    """A request as the engine sees it."""

    index: int
    prompt_tokens: int
    output_tokens: int
    output_content: object  # names the generated text
    tokens: list[Token]  # the prompt, then the outputs that the engine has processed
    state: str = "waiting"  # waiting -> running (-> waiting -> running ...) -> finished | aborted
    kv_len: int = 0  # tokens whose KV is computed, or is being computed by a step in flight
    in_flight: int = 0  # output tokens that a step in flight will sample: counted already, their value unknown
    blocks: list["Block"] = field(default_factory=list)
    n_registered: int = 0  # leading blocks that other requests can find
    tokens_in_flight: int = 0  # of steps whose output was not processed
    group_blocks: list[list] = field(default_factory=list)  # by group of layers, see `reference_groups`
    shared_prefix: int = 0
    preemptions: int = 0
    priority: int = 0  # the smallest comes first
    arrival_time: float = 0.0  # as its front end says

    @property
    def is_alive(self) -> bool:
        return self.state in ("waiting", "running")

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens

    @property
    def place_in_queue(self) -> tuple[int, float, str]:
        """Where priorities decide, requests wait in this order; vLLM's request ids are texts."""
        return self.priority, self.arrival_time, str(self.index)

    def append_output(self) -> None:
        """The next output token becomes known."""
        self.tokens.append((self.output_content, len(self.tokens) - self.prompt_tokens))


def make_request(description: dict) -> Request:
    """A `Request` from its description in a scenario."""
    content = description["output_content"]
    prompt = [(c, offset) for c, n in description["prompt_segments"] for offset in range(n)]
    return Request(
        index=description["index"],
        prompt_tokens=len(prompt),
        output_tokens=description["output_tokens"],
        output_content=("text of request", description["index"]) if content is None else content,
        tokens=prompt,
        priority=description.get("priority", 0),
        arrival_time=arrival_time(description),
    )


def arrival_time(description: dict) -> float:
    """When a request arrived by its own account; unless it says otherwise, when it reaches the engine."""
    return float(description.get("arrival_time", description.get("arrival_us", description.get("arrival_step"))))


# --------------------------------------------------------------------------------------------------------------------
# KV blocks
# --------------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Block:
    """A block of KV slots. A free block keeps its content (`prefix`) until someone takes it."""

    n_users: int = 0
    prefix: int | None = None  # names the text from the start of the request to the end of this block, once registered


class BlockPool:
    """All KV blocks: a FIFO queue of the free ones, and a register that finds blocks by the text that they end."""

    def __init__(self, config: dict, rules: Rules):
        self.block_size: int = config["block_size"]
        self.enable_prefix_caching: bool = config["enable_prefix_caching"]
        self.rules = rules
        num_gpu_blocks: int = config["num_gpu_blocks"]
        # vLLM keeps one block of the total to itself (the "null block").
        self.n_usable = num_gpu_blocks - 1
        self.free: deque[Block] = deque(Block() for _ in range(self.n_usable))
        # Equal texts computed by two requests are not merged: a prefix can have several blocks, and the oldest is
        # found.
        self.register: dict[int, list[Block]] = {}
        self._prefix_names: dict[tuple[int | None, tuple[Token, ...]], int] = {}

    @property
    def blocks_in_use(self) -> int:
        return self.n_usable - len(self.free)

    def blocks_for(self, n_tokens: int) -> int:
        """Blocks that hold `n_tokens`."""
        return -(-n_tokens // self.block_size)

    def prefixes(self, tokens: list[Token], n_blocks: int) -> list[int]:
        """Names of the first `n_blocks` full blocks of a text. A name stands for everything up to the block's end."""
        names: list[int] = []
        parent: int | None = None
        for i in range(n_blocks):
            key = (parent, tuple(tokens[i * self.block_size : (i + 1) * self.block_size]))
            parent = self._prefix_names.setdefault(key, len(self._prefix_names))
            names.append(parent)
        return names

    def find_cached(self, tokens: list[Token]) -> list[Block]:
        """The longest chain of registered blocks that starts this text.

        At least one token must be left to compute, else there is nothing to sample from. Hits are whole blocks, so a
        text of exactly n blocks that is cached in full recomputes its last block.
        """
        if not self.enable_prefix_caching:
            return []
        found: list[Block] = []
        for prefix in self.prefixes(tokens, (len(tokens) - 1) // self.block_size):
            if prefix not in self.register:
                break
            found.append(self.register[prefix][0])
        return found

    def fits(self, request: Request, n_tokens: int, cached: list[Block]) -> bool:
        """Whether there are free blocks for a request's first `n_tokens`, the leading ones being `cached`."""
        n_new = self.blocks_for(n_tokens) - len(request.blocks) - len(cached)
        # A cached block that nobody uses is in the free queue; using it again takes it out.
        n_revived = sum(block.n_users == 0 for block in cached)
        return n_new + n_revived <= len(self.free)

    def allocate(self, request: Request, n_tokens: int, cached: list[Block]) -> bool:
        """Give a request blocks for its first `n_tokens`, the leading ones out of `cached`. All or nothing."""
        if not self.fits(request, n_tokens, cached):
            return False
        n_new = self.blocks_for(n_tokens) - len(request.blocks) - len(cached)
        for block in cached:
            if block.n_users == 0:
                self.free.remove(block)
            block.n_users += 1
        request.blocks += cached
        request.n_registered += len(cached)
        for _ in range(n_new):
            block = self.free.popleft()
            self._forget(block)
            block.n_users = 1
            request.blocks.append(block)
        return True

    def register_full_blocks(self, request: Request, n_tokens: int) -> None:
        """Let others find the full blocks among a request's first `n_tokens`."""
        n_full = n_tokens // self.block_size
        if not self.enable_prefix_caching or n_full <= request.n_registered:
            return
        prefixes = self.prefixes(request.tokens, n_full)
        for i in range(request.n_registered, n_full):
            request.blocks[i].prefix = prefixes[i]
            self.register.setdefault(prefixes[i], []).append(request.blocks[i])
        request.n_registered = n_full

    def release(self, request: Request) -> None:
        """Take all blocks from a request, the last one first, so that prefixes outlive what follows them.

        Newer releases put blocks that nobody can find in front, to be taken first.
        """
        unfindable: list[Block] = []
        for block in reversed(request.blocks):
            block.n_users -= 1
            assert block.n_users >= 0
            if block.n_users == 0:
                if self.rules.takes_unfindable_blocks_first and block.prefix is None:
                    unfindable.append(block)
                else:
                    self.free.append(block)
        self.free.extendleft(reversed(unfindable))
        request.blocks = []
        request.n_registered = 0

    def _forget(self, block: Block) -> None:
        """A free block is taken for new content: what it held can no longer be found."""
        if block.prefix is None:
            return
        holders = self.register[block.prefix]
        holders.remove(block)
        if not holders:
            del self.register[block.prefix]
        block.prefix = None


# --------------------------------------------------------------------------------------------------------------------
# Scheduler
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """What a step-time model may look at.

    Parameters
    ----------
    scheduled : list of tuple of int
        ``(request index, new tokens, tokens computed before)`` in scheduler order.
    n_waiting, n_running : int
        Length of the queues after the ``schedule()`` call.
    """

    scheduled: list[tuple[int, int, int]]
    n_waiting: int
    n_running: int


@dataclass
class Step:
    """The result of one ``schedule()`` call."""

    number: int
    rows: list[tuple[Request, int, int, bool]]  # request, new tokens, tokens computed before, does it sample a token
    preempted: list[int]
    cached_tokens: list[tuple[int, int]]
    blocks_in_use: int
    n_waiting: int
    n_running: int
    end_us: float = 0.0

    @property
    def is_empty(self) -> bool:
        return not self.rows

    def as_batch(self) -> Batch:
        return Batch([(r.index, n, before) for r, n, before, _ in self.rows], self.n_waiting, self.n_running)

    def as_recorded(self) -> dict:
        return {
            "scheduled": [[r.index, n] for r, n, _, _ in self.rows],
            "preempted": self.preempted,
            "blocks_in_use": self.blocks_in_use,
            "cached_tokens": [list(hit) for hit in self.cached_tokens],
        }


class Scheduler:
    """Continuous batching: first come, first served, or by priority."""

    def __init__(self, config: dict):
        self.max_num_seqs: int = config["max_num_seqs"]
        self.max_num_batched_tokens: int = config["max_num_batched_tokens"]
        self.by_priority: bool = config.get("scheduling_policy", "fcfs") == "priority"
        self.chunks_prompts: bool = config.get("enable_chunked_prefill", True)
        self.long_prefill_token_threshold: int = config.get("long_prefill_token_threshold", 0)
        self.rules = RULES[config.get("vllm_version", "0.15.1")]
        if "kv_groups" in config:
            from reference_groups import GroupedPool

            self.pool: BlockPool = GroupedPool(config, self.rules)
        else:
            self.pool = BlockPool(config, self.rules)
        self.waiting: deque[Request] = deque()  # the first one is next
        self.running: list[Request] = []  # in order of admission
        self.n_steps = 0
        # vLLM tells the workers about ended requests with the next batch, even an empty one. So after the last
        # request has ended, schedule() is called once more.
        self.has_ended_requests_to_report = False

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self.has_ended_requests_to_report)

    def add(self, request: Request) -> None:
        self.waiting.append(request)
        self._sort_waiting()

    def _sort_waiting(self) -> None:
        if self.by_priority:
            self.waiting = deque(sorted(self.waiting, key=lambda request: request.place_in_queue))

    def schedule(self) -> Step:
        """Choose the next batch. What it will compute counts as computed from here on."""
        budget = self.max_num_batched_tokens
        rows: dict[Request, int] = {}
        preempted: list[int] = []
        cached_tokens: list[tuple[int, int]] = []
        most_tokens = self._most_tokens_of_a_request()

        # Running requests first, in order of admission: decodes and unfinished prefills alike. Behind long prompts the
        # budget may end before all have had their turn.
        position = 0
        while position < len(self.running) and budget > 0:
            request = self.running[position]
            if request.in_flight and len(request.tokens) + request.in_flight == request.total_tokens:
                # Its last token is being sampled right now (asynchronous scheduling only). There is nothing more to
                # compute, but it holds its slot and its blocks until that output is processed, and it can still be
                # preempted.
                position += 1
                continue
            new_tokens = min(len(request.tokens) + request.in_flight - request.kv_len, most_tokens, budget)
            assert new_tokens > 0
            while request.state == "running" and not self.pool.allocate(request, request.kv_len + new_tokens, []):
                victim = self._victim()
                place = self.running.index(victim)
                del self.running[place]
                # A victim that had its turn already gives its tokens back.
                had_turn = victim in rows
                budget += rows.pop(victim, 0)
                if had_turn or (place < position and self.rules.keeps_place_after_preemption):
                    position -= 1
                self._preempt(victim)
                preempted.append(victim.index)
            if request.state != "running":  # it preempted itself
                if self.by_priority and self.rules.keeps_place_after_preemption:
                    continue
                break
            # Only blocks whose tokens are all known get registered: a token still in flight has no hash yet.
            self.pool.register_full_blocks(request, min(request.kv_len + new_tokens, len(request.tokens)))
            rows[request] = new_tokens
            budget -= new_tokens
            position += 1

        # Then waiting requests, strictly in order: one that does not fit blocks those behind it. A step that had to
        # preempt admits nobody.
        while not preempted and self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            assert request.in_flight == 0 and request.kv_len == 0 and not request.blocks
            cached = self.pool.find_cached(request.tokens)
            hit_tokens = len(cached) * self.pool.block_size
            # A prompt longer than the budget starts with what is left of it, and gets blocks for that chunk only.
            new_tokens = min(len(request.tokens) - hit_tokens, most_tokens)
            if new_tokens > budget and not self.chunks_prompts:
                break
            new_tokens = min(new_tokens, budget)
            # Newer releases admit a request only if all its tokens would fit, though it gets blocks for the chunk.
            if self.rules.admits_whole_sequences and not self.pool.fits(request, len(request.tokens), cached):
                break
            if not self.pool.allocate(request, hit_tokens + new_tokens, cached):
                break
            # Registered before they are computed: a request behind this one in the same step can already share them.
            self.pool.register_full_blocks(request, hit_tokens + new_tokens)
            self.waiting.popleft()
            self.running.append(request)
            request.state = "running"
            request.kv_len = hit_tokens
            cached_tokens.append((request.index, hit_tokens))
            rows[request] = new_tokens
            budget -= new_tokens

        step = Step(
            number=self.n_steps,
            rows=[self._commit(request, new_tokens) for request, new_tokens in rows.items()],
            preempted=preempted,
            cached_tokens=cached_tokens,
            blocks_in_use=self.pool.blocks_in_use,
            n_waiting=len(self.waiting),
            n_running=len(self.running),
        )
        self.n_steps += 1
        self.has_ended_requests_to_report = False
        return step

    def _most_tokens_of_a_request(self) -> int:
        is_lone = len(self.running) + len(self.waiting) <= 1
        if self.long_prefill_token_threshold == 0 or (is_lone and self.rules.spares_lone_requests):
            return self.max_num_batched_tokens
        return self.long_prefill_token_threshold

    def _victim(self) -> Request:
        """Who gives up its blocks: the last one, or the last to arrive of the least important."""
        if self.by_priority:
            return max(self.running, key=lambda request: (request.priority, request.arrival_time))
        return self.running[-1]

    def _preempt(self, victim: Request) -> None:
        """Free all its blocks and start it over, from the front of the queue, or from the place that its priority gives it.

        Its outputs so far are prompt now.

        A token of the victim in flight is not lost: it is appended when that step's output is processed.
        """
        self.pool.release(victim)
        victim.kv_len = 0
        victim.state = "waiting"
        victim.preemptions += 1
        self.waiting.appendleft(victim)
        self._sort_waiting()

    @staticmethod
    def _commit(request: Request, new_tokens: int) -> tuple[Request, int, int, bool]:
        computed_before = request.kv_len
        request.kv_len += new_tokens
        request.tokens_in_flight += new_tokens
        samples = request.kv_len == len(request.tokens) + request.in_flight
        if samples:
            request.in_flight += 1
        return request, new_tokens, computed_before, samples

    def process_output(self, step: Step) -> list[Request]:
        """Append the tokens that a step has sampled, end what is complete, return who got one in batch order."""
        emitted: list[Request] = []
        for request, new_tokens, _, samples in step.rows:
            request.tokens_in_flight -= new_tokens
            if not samples or not request.is_alive:
                continue  # a chunk of a prompt, or aborted while the step was in flight
            request.append_output()
            request.in_flight -= 1
            if request.state == "running":
                # With asynchronous scheduling the next step was scheduled before this token was known; its block may be
                # complete only now. (Preempted meanwhile: no blocks to register.)
                self.pool.register_full_blocks(request, request.kv_len - request.in_flight)
            if len(request.tokens) == request.total_tokens:
                self._end(request, "finished")
            emitted.append(request)
        return emitted

    def abort(self, request: Request) -> None:
        """End a request at once, whether waiting, running or in flight."""
        self._end(request, "aborted")

    def _end(self, request: Request, state: str) -> None:
        # A request preempted while its last token was in flight ends from the waiting queue.
        if request.state == "running":
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self.pool.release(request)
        request.state = state
        self.has_ended_requests_to_report = True


# --------------------------------------------------------------------------------------------------------------------
# When things happen
# --------------------------------------------------------------------------------------------------------------------


class StepNumbers:
    """Arrivals and aborts numbered by ``schedule()`` calls: no clock, every test of the order is exact."""

    def __init__(self, descriptions: list[dict]):
        self.pending = list(descriptions)
        self.descriptions = descriptions
        self.next_step = 0

    def wait_for_arrival(self) -> None:
        """The engine is idle: the next arrivals come now, whatever their number."""
        earliest = min(d["arrival_step"] for d in self.pending)
        self.pending = [
            {**d, "arrival_step": self.next_step} if d["arrival_step"] == earliest else d for d in self.pending
        ]

    def take_arrivals(self) -> list[int]:
        due = [d["index"] for d in self.pending if d["arrival_step"] <= self.next_step]
        self.pending = [d for d in self.pending if d["arrival_step"] > self.next_step]
        return due

    def aborts_between_steps(self) -> list[int]:
        return [d["index"] for d in self.descriptions if d["abort_step"] == self.next_step]

    def aborts_in_flight(self, step: Step) -> list[int]:
        return [d["index"] for d in self.descriptions if d.get("abort_before_output_of_step") == step.number]

    def start(self, step: Step) -> dict:
        self.next_step = step.number + 1
        return {}

    def finish(self, step: Step) -> None: ...

    def finished(self, index: int) -> None: ...

    now_us: float | None = None


class Clock:
    """Arrivals and aborts in microseconds. The device runs one batch at a time, in the order of scheduling."""

    def __init__(self, descriptions: list[dict], step_time_us: Callable[[Batch], float]):
        self.pending = deque(sorted(descriptions, key=lambda d: d["arrival_us"]))
        self.abort_us: dict[int, float] = {}
        for d in descriptions:
            limits = [d["abort_us"]] if d.get("abort_us") is not None else []
            limits += [d["arrival_us"] + d["timeout_us"]] if d.get("timeout_us") is not None else []
            if limits:
                self.abort_us[d["index"]] = min(limits)
        self.step_time_us = step_time_us
        self.now_us = 0.0
        self.device_free_at_us = 0.0

    def wait_for_arrival(self) -> None:
        self.now_us = max(self.now_us, self.pending[0]["arrival_us"])

    def take_arrivals(self) -> list[int]:
        due: list[int] = []
        while self.pending and self.pending[0]["arrival_us"] <= self.now_us:
            due.append(self.pending.popleft()["index"])
        return due

    def aborts_between_steps(self) -> list[int]:
        # In the order in which the clients gave up.
        return [
            i for i, _ in sorted(self.abort_us.items(), key=lambda a: (a[1], a[0])) if self.abort_us[i] <= self.now_us
        ]

    def aborts_in_flight(self, step: Step) -> list[int]:
        # What arrived during the step is aborted before its output is processed: the output comes too late.
        return self.aborts_between_steps()

    def start(self, step: Step) -> dict:
        """The step runs as soon as the device has finished the step before it; an empty one takes no time."""
        start_us = max(self.now_us, self.device_free_at_us)
        duration_us = 0.0 if step.is_empty else self.step_time_us(step.as_batch())
        step.end_us = start_us + duration_us
        self.device_free_at_us = max(self.device_free_at_us, step.end_us)
        return {"schedule_us": self.now_us, "start_us": start_us, "duration_us": duration_us}

    def finish(self, step: Step) -> None:
        self.now_us = max(self.now_us, step.end_us)

    def finished(self, index: int) -> None:
        """The output with a request's last token is processed. Here, nobody waits for it."""


# --------------------------------------------------------------------------------------------------------------------
# Engine
# --------------------------------------------------------------------------------------------------------------------


def simulate(scenario: dict, step_time_us: Callable[[Batch], float] | None = None, clock: Clock | None = None) -> dict:
    """Run a scenario to its end.

    Parameters
    ----------
    scenario : dict
        ``config`` and ``requests`` of the recording format (``tests/conformance/README.md``). Requests have
        ``arrival_step``, ``abort_step`` and ``abort_before_output_of_step``, or, with `step_time_us`, ``arrival_us``
        and the optional ``abort_us`` and ``timeout_us`` (from the arrival).
    step_time_us : callable, optional
        Microseconds that the device needs for a `Batch`.
    clock : Clock, optional
        When things happen, in place of the requests' own times; it knows the step time.

    Returns
    -------
    dict
        ``steps``, one a ``schedule()`` call, and ``outcome``, one a request. With a clock, a step has also
        ``schedule_us``, ``start_us`` and ``duration_us``, and an outcome ``first_scheduled_us`` (the start of its
        first step), ``first_token_us`` and ``finish_us`` (when the engine has processed that output, or the abort).

    Raises
    ------
    ValueError
        If a request can never run: longer than ``max_model_len``, more blocks than there are, or no token at all.
    EndlessError
        If requests preempt each other, or wait, for ever.
    """
    descriptions = scenario["requests"]
    config = scenario["config"]
    for d in descriptions:
        check_fits(d, config)
    if clock is None:
        clock = StepNumbers(descriptions) if step_time_us is None else Clock(descriptions, step_time_us)
    scheduler = Scheduler(config)
    # With asynchronous scheduling, vLLM keeps a second batch ready while the first one runs.
    max_batches_in_flight = 2 if config["async_scheduling"] else 1

    requests = {d["index"]: make_request(d) for d in descriptions}
    known: set[int] = set()  # added to the scheduler so far
    in_flight: deque[Step] = deque()
    steps: list[dict] = []
    first_token_step: dict[int, int] = {}
    finish_step: dict[int, int] = {}
    first_scheduled_us: dict[int, float] = {}
    first_token_us: dict[int, float] = {}
    finish_us: dict[int, float] = {}
    n_vain_events = 0

    def abort(indices: list[int]) -> None:
        for index in indices:
            if index in known and requests[index].is_alive:
                scheduler.abort(requests[index])
                finish_us[index] = clock.now_us

    while True:
        # 1. Take in what has arrived. An idle engine sleeps until something does.
        if not scheduler.has_work and not in_flight:
            if not clock.pending:
                break
            clock.wait_for_arrival()
        for index in clock.take_arrivals():
            scheduler.add(requests[index])
            known.add(index)
        abort(clock.aborts_between_steps())

        # 2. Schedule. While there is room for another batch in flight, filling it goes before waiting for results.
        if scheduler.has_work:
            step = scheduler.schedule()
            in_flight.append(step)
            times = clock.start(step)
            steps.append({**step.as_recorded(), **times})
            n_vain_events += len(step.preempted) + step.is_empty
            if n_vain_events > MOST_VAIN_EVENTS:
                raise EndlessError(f"no token in {n_vain_events} preemptions and empty steps up to step {step.number}")
            if times:
                for request, *_ in step.rows:
                    first_scheduled_us.setdefault(request.index, times["start_us"])
            if not step.is_empty and len(in_flight) < max_batches_in_flight:
                continue

        # 3. Wait for the oldest batch and process its output; aborts that came meanwhile first.
        step = in_flight.popleft()
        clock.finish(step)
        abort(clock.aborts_in_flight(step))
        for request in scheduler.process_output(step):
            n_vain_events = 0
            first_token_step.setdefault(request.index, step.number)
            first_token_us.setdefault(request.index, clock.now_us)
            if request.state == "finished":
                finish_step[request.index] = step.number
                finish_us[request.index] = clock.now_us
                clock.finished(request.index)

    assert scheduler.pool.blocks_in_use == 0
    outcome = []
    for index, request in requests.items():
        assert not request.is_alive
        row = {
            "index": index,
            "first_token_step": first_token_step.get(index),
            "finish_step": finish_step.get(index),
            "status": request.state,
            "preemptions": request.preemptions,
        }
        if step_time_us is not None:
            row["first_scheduled_us"] = first_scheduled_us.get(index)
            row["first_token_us"] = first_token_us.get(index)
            row["finish_us"] = finish_us.get(index)
        outcome.append(row)
    return {"steps": steps, "outcome": outcome}


def affine_step_time_us(coefficients: dict) -> Callable[[Batch], float]:
    """The step time of the timed recordings: affine in new tokens, requests, KV tokens and waiting requests."""

    def step_time_us(batch: Batch) -> float:
        return (
            coefficients["constant_us"]
            + coefficients["per_token_us"] * sum(n for _, n, _ in batch.scheduled)
            + coefficients["per_request_us"] * len(batch.scheduled)
            + coefficients["per_kv_token_us"] * sum(before + n for _, n, before in batch.scheduled)
            + coefficients["per_waiting_us"] * batch.n_waiting
        )

    return step_time_us


def check_fits(description: dict, config: dict) -> None:
    """Refuse a request that could never run; vLLM would schedule empty steps for ever."""
    index, output_tokens = description["index"], description["output_tokens"]
    prompt_tokens = num_tokens(description["prompt_segments"])
    if prompt_tokens < 1 or output_tokens < 1:
        raise ValueError(
            f"request {index}: {prompt_tokens} prompt and {output_tokens} output tokens; both must be at least 1"
        )
    if prompt_tokens + output_tokens > config["max_model_len"]:
        raise ValueError(
            f"request {index}: {prompt_tokens} + {output_tokens} tokens exceed max_model_len {config['max_model_len']}"
        )
    # The last output token is never fed back, so it needs no KV slot.
    needed = -(-(prompt_tokens + output_tokens - 1) // config["block_size"])
    has_window = "kv_groups" in config  # a request then holds other numbers of blocks in each group
    if needed > config["num_gpu_blocks"] - 1 and not has_window:
        raise ValueError(f"request {index}: needs {needed} KV blocks, usable are {config['num_gpu_blocks'] - 1}")
