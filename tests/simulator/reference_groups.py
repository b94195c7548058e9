"""A slow reference of KV blocks in several groups: layers with full attention beside layers that see a window.

As vLLM 0.33.0 does it. Every group has its own blocks for the same tokens, out of one pool. Blocks that a window has
left behind are given back; a prefix is found only as far as every group can go on from there.
"""

from vllm_reference import Block, BlockPool, Request, Rules, Token

FULL, SLIDING, CHUNKED = "full", "sliding", "chunked"


class Hit:
    """Cached blocks that start a text, by group: None where a window no longer needs one."""

    def __init__(self, groups: list[list[Block | None]], shared_prefix: int):
        self.groups = groups
        # Blocks that the full-attention group has cached, where a window cannot go on from there; else 0. Newcomers
        # keep their window's blocks there, for the next one.
        self.shared_prefix = shared_prefix

    def __len__(self) -> int:
        return len(self.groups[0])


class GroupedPool(BlockPool):
    """KV blocks of one pool for several groups of layers, ``config["kv_groups"]``: ``[[kind, window], ...]``."""

    def __init__(self, config: dict, rules: Rules):
        super().__init__(config, rules)
        self.groups: list[tuple[str, int]] = [(kind, window) for kind, window in config["kv_groups"]]
        batches = 2 if config["async_scheduling"] else 1
        self.most_in_flight: int = batches * config["max_num_batched_tokens"]
        self.max_model_len: int = config["max_model_len"]

    def skipped_blocks(self, group: int, n_computed: int) -> int:
        """Leading blocks that a group's attention no longer reads when the next token is computed."""
        kind, window = self.groups[group]
        if kind == SLIDING:
            return max(0, n_computed - window + 1) // self.block_size
        if kind == CHUNKED:
            return n_computed // window * window // self.block_size
        return 0

    def most_blocks(self, group: int, n_tokens: int) -> int:
        """Blocks that a request of `n_tokens` holds at most at one time, as admission counts them."""
        kind, window = self.groups[group]
        if kind == SLIDING:
            n = min(window - 1 + self.most_in_flight, self.max_model_len)
            return min(self.blocks_for(n_tokens), self.blocks_for(n) + 1)
        if kind == CHUNKED:
            n = min(window + self.most_in_flight, self.max_model_len)
            return min(self.blocks_for(n_tokens), self.blocks_for(n))
        return self.blocks_for(n_tokens)

    def window_blocks(self, group: int) -> int:
        """Blocks before a position that a sliding window needs to go on from there."""
        return -(-(self.groups[group][1] - 1) // self.block_size)

    # -- prefix hits ---------------------------------------------------------------------------------------------

    def _cached(self, prefix: int, groups: list[int]) -> list[Block] | None:
        """The oldest block of a prefix in each of some groups, or None if one lacks it."""
        if all((g, prefix) in self.register for g in groups):
            return [self.register[g, prefix][0] for g in groups]
        return None

    def find_cached(self, tokens: list[Token]) -> Hit:
        n_groups = len(self.groups)
        if not self.enable_prefix_caching:
            return Hit([[] for _ in range(n_groups)], 0)
        prefixes = self.prefixes(tokens, (len(tokens) - 1) // self.block_size)
        full = [g for g, (kind, _) in enumerate(self.groups) if kind == FULL]
        others = [g for g in range(n_groups) if g not in full]
        found: list[list[Block | None]] = [[] for _ in range(n_groups)]
        length = len(tokens) - 1
        n = len(prefixes)
        if full:
            n = 0
            while n < len(prefixes) and (blocks := self._cached(prefixes[n], full)):
                for g, block in zip(full, blocks, strict=True):
                    found[g].append(block)
                n += 1
            length = n * self.block_size
        n_full = n
        if others:
            kind, window = self.groups[others[0]]
            lists = (
                self._chunk(prefixes, others, length, window) if kind == CHUNKED else self._tail(prefixes, others, n)
            )
            for g, blocks in zip(others, lists, strict=True):
                found[g] = blocks
            n = len(lists[0])
            for g in full:
                del found[g][n:]
        return Hit(found, n_full if full and n_full > n else 0)

    def _tail(self, prefixes: list[int], groups: list[int], n: int) -> list[list[Block | None]]:
        """The longest prefix of at most `n` blocks whose last window is cached, or whatever is from the start."""
        lists: list[list[Block | None]] = [[None] * n for _ in groups]
        need, run = self.window_blocks(groups[0]), 0
        for i in range(n - 1, -1, -1):
            blocks = self._cached(prefixes[i], groups)
            run = 0 if blocks is None else run + 1
            if blocks is not None:
                for listed, block in zip(lists, blocks, strict=True):
                    listed[i] = block
                if run >= need:
                    return [listed[: i + run] for listed in lists]
        return [listed[:run] for listed in lists]

    def _chunk(self, prefixes: list[int], groups: list[int], length: int, chunk: int) -> list[list[Block | None]]:
        """What lies before the last chunk counts as there; of the chunk, what is cached from its start."""
        start = length // chunk * chunk // self.block_size
        lists: list[list[Block | None]] = [[None] * start for _ in groups]
        for i in range(start, length // self.block_size):
            blocks = self._cached(prefixes[i], groups)
            if blocks is None:
                break
            for listed, block in zip(lists, blocks, strict=True):
                listed.append(block)
        return lists

    # -- allocation ----------------------------------------------------------------------------------------------

    def _blocks_missing(self, request: Request, n_tokens: int, hit: Hit | list, *, as_admitted: bool) -> int:
        """Free blocks that a request's first `n_tokens` take: new ones, and hits that nobody uses."""
        total = 0
        for g in range(len(self.groups)):
            required = self.most_blocks(g, n_tokens) if as_admitted else self.blocks_for(n_tokens)
            if request.state == "running":
                total += max(required - len(request.group_blocks[g]), 0)
                continue
            blocks = hit.groups[g] if isinstance(hit, Hit) else []
            skipped = self.skipped_blocks(g, len(blocks) * self.block_size)
            total += max(required - max(skipped, len(blocks)), 0)
            total += sum(block is not None and block.n_users == 0 for block in blocks[skipped:])
        return total

    def fits(self, request: Request, n_tokens: int, cached: Hit | list) -> bool:
        return self._blocks_missing(request, n_tokens, cached, as_admitted=True) <= len(self.free)

    def allocate(self, request: Request, n_tokens: int, cached: Hit | list) -> bool:
        if request.state == "running":
            # Windows are cut by what is processed: a step in flight may still read what it left behind.
            self._leave_behind(request, max(0, request.kv_len - request.tokens_in_flight))
        if self._blocks_missing(request, n_tokens, cached, as_admitted=False) > len(self.free):
            return False
        if isinstance(cached, Hit):
            self._take_hits(request, cached)
        for blocks in request.group_blocks:
            for _ in range(self.blocks_for(n_tokens) - len(blocks)):
                block = self.free.popleft()
                self._forget(block)
                block.n_users = 1
                blocks.append(block)
        return True

    def _take_hits(self, request: Request, hit: Hit) -> None:
        request.shared_prefix = hit.shared_prefix
        request.n_registered = len(hit)
        request.group_blocks = []
        for g, blocks in enumerate(hit.groups):
            skipped = self.skipped_blocks(g, len(hit) * self.block_size)
            kept = blocks[skipped:]
            for block in kept:
                if block is None:
                    continue
                if block.n_users == 0:
                    self.free.remove(block)
                block.n_users += 1
            request.group_blocks.append([None] * skipped + kept)

    def _leave_behind(self, request: Request, n_processed: int) -> None:
        for g, blocks in enumerate(request.group_blocks):
            freed: list[Block] = []
            for i in range(min(self.skipped_blocks(g, n_processed), len(blocks)) - 1, -1, -1):
                block = blocks[i]
                if block is None:
                    break
                freed.append(block)
                blocks[i] = None
            self._give_back(freed)

    def _give_back(self, blocks: list[Block]) -> None:
        """In the order in which they are to be taken again; those that nobody can find first of all."""
        unfindable: list[Block] = []
        for block in blocks:
            block.n_users -= 1
            if block.n_users == 0:
                (unfindable if block.prefix is None else self.free).append(block)
        self.free.extendleft(reversed(unfindable))

    def release(self, request: Request) -> None:
        for blocks in request.group_blocks:
            self._give_back([block for block in reversed(blocks) if block is not None])
        request.group_blocks = []
        request.n_registered = 0

    # -- what others can find ------------------------------------------------------------------------------------

    def _is_kept(self, request: Request, group: int, i: int) -> bool:
        """Whether block `i` is registered: of a sliding window, only where a later prompt can go on.

        That is before the prompt's last token, and where a shared prefix was found to end.
        """
        kind, _ = self.groups[group]
        if kind != SLIDING:
            return True
        ends = [(request.prompt_tokens - 1) // self.block_size, request.shared_prefix]
        return any(end - self.window_blocks(group) <= i < end for end in ends)

    def register_full_blocks(self, request: Request, n_tokens: int) -> None:
        n_full = n_tokens // self.block_size
        if not self.enable_prefix_caching or n_full <= request.n_registered:
            return
        prefixes = self.prefixes(request.tokens, n_full)
        for g, blocks in enumerate(request.group_blocks):
            for i in range(request.n_registered, n_full):
                block = blocks[i]
                if block is not None and self._is_kept(request, g, i):
                    block.prefix = (g, prefixes[i])
                    self.register.setdefault((g, prefixes[i]), []).append(block)
        request.n_registered = n_full
