"""A slow reference of KV blocks in several groups: layers with full attention beside layers that see a window.

Every group has its own blocks for the same tokens, out of one pool. Blocks that a window has left behind are given back;
a prefix is found only as far as every group can go on from there. What releases do differently is in `Rules`.
"""

from vllm_reference import Block, BlockPool, Request, Rules, Token

FULL, SLIDING, CHUNKED = "full", "sliding", "chunked"


class Hit:
    """Cached blocks that start a text, by group: None where a window no longer needs one."""

    def __init__(self, groups: list[list[Block | None]], shared_prefix: int):
        self.groups = groups
        # Blocks that some groups have cached, where others cannot go on from there; else 0. Newcomers keep the blocks of
        # their sliding windows there, for the next one.
        self.shared_prefix = shared_prefix

    def __len__(self) -> int:
        return len(self.groups[0])


class GroupedPool(BlockPool):
    """KV blocks of one pool for several groups of layers, ``config["kv_groups"]``: ``[[kind, window], ...]``."""

    def __init__(self, config: dict, rules: Rules):
        super().__init__(config, rules)
        self.groups: list[tuple[str, int]] = [(kind, window) for kind, window in config["kv_groups"]]
        # What is alike is looked up together, full attention first.
        self.alike: list[tuple[str, int, list[int]]] = []
        for kind, window in sorted(dict.fromkeys(self.groups), key=lambda group: group[0] != FULL):
            self.alike.append((kind, window, [g for g, group in enumerate(self.groups) if group == (kind, window)]))
        batches = 2 if config["async_scheduling"] and rules.counts_all_batches_in_flight else 1
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
        if not self.rules.knows_that_windows_slide:
            return self.blocks_for(n_tokens)
        if kind == SLIDING:
            n = min(window - 1 + self.most_in_flight, self.max_model_len)
            return min(self.blocks_for(n_tokens), self.blocks_for(n) + 1)
        if kind == CHUNKED:
            n = min(window + self.most_in_flight, self.max_model_len)
            return min(self.blocks_for(n_tokens), self.blocks_for(n))
        return self.blocks_for(n_tokens)

    def window_blocks(self, window: int) -> int:
        """Blocks before a position that a sliding window needs to go on from there."""
        return -(-(window - 1) // self.block_size)

    # -- prefix hits ---------------------------------------------------------------------------------------------

    def _cached(self, prefix: int, groups: list[int]) -> list[Block] | None:
        """The oldest block of a prefix in each of some groups, or None if one lacks it."""
        if all((g, prefix) in self.register for g in groups):
            return [self.register[g, prefix][0] for g in groups]
        return None

    def find_cached(self, tokens: list[Token]) -> Hit:
        n_groups = len(self.groups)
        found: list[list[Block | None]] = [[] for _ in range(n_groups)]
        if not self.enable_prefix_caching:
            return Hit(found, 0)
        prefixes = self.prefixes(tokens, (len(tokens) - 1) // self.block_size)
        # Each kind takes what the ones before it have left, until all agree: what one has cut, another may have to cut
        # further. Beside full attention one other kind needs no second look.
        length, longest = len(tokens) - 1, 0
        is_simple = len(self.alike) == 1 or (len(self.alike) == 2 and self.alike[0][0] == FULL)
        has_looked = False
        while True:
            left = length
            for kind, window, groups in self.alike:
                if kind == FULL and has_looked:
                    continue  # a shorter prefix is cached too
                lists = self._find(prefixes, kind, window, groups, left)
                for g, blocks in zip(groups, lists, strict=True):
                    found[g] = blocks
                left = len(lists[0]) * self.block_size
                longest = max(longest, left)
            has_looked = True
            if left >= length:
                break
            length = left
            if is_simple:
                break
        n = length // self.block_size
        return Hit([blocks[:n] for blocks in found], longest // self.block_size if longest > length else 0)

    def _find(
        self, prefixes: list[int], kind: str, window: int, groups: list[int], length: int
    ) -> list[list[Block | None]]:
        """The longest prefix of at most `length` tokens from which groups that are alike can go on."""
        if kind == SLIDING:
            return self._tail(prefixes, groups, length // self.block_size, self.window_blocks(window))
        # What lies before the last chunk counts as there; of the chunk, what is cached from its start.
        start = length // window * window // self.block_size if kind == CHUNKED else 0
        lists: list[list[Block | None]] = [[None] * start for _ in groups]
        for i in range(start, length // self.block_size):
            blocks = self._cached(prefixes[i], groups)
            if blocks is None:
                break
            for listed, block in zip(lists, blocks, strict=True):
                listed.append(block)
        return lists

    def _tail(self, prefixes: list[int], groups: list[int], n: int, need: int) -> list[list[Block | None]]:
        """The longest prefix of at most `n` blocks whose last window is cached, or whatever is from the start."""
        lists: list[list[Block | None]] = [[None] * n for _ in groups]
        run = 0
        for i in range(n - 1, -1, -1):
            blocks = self._cached(prefixes[i], groups)
            run = 0 if blocks is None else run + 1
            if blocks is not None:
                for listed, block in zip(lists, blocks, strict=True):
                    listed[i] = block
                if run >= need:
                    return [listed[: i + run] for listed in lists]
        return [listed[:run] for listed in lists]

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
            # A step in flight may still read what it left behind; only newer releases wait for it.
            in_flight = request.tokens_in_flight if self.rules.waits_for_windows_in_flight else 0
            self._leave_behind(request, max(0, request.kv_len - in_flight))
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
        """In the order in which they are to be taken again; in newer releases, what nobody can find first of all."""
        unfindable: list[Block] = []
        for block in blocks:
            block.n_users -= 1
            if block.n_users == 0:
                is_first = self.rules.takes_unfindable_blocks_first and block.prefix is None
                (unfindable if is_first else self.free).append(block)
        self.free.extendleft(reversed(unfindable))

    def release(self, request: Request) -> None:
        for blocks in request.group_blocks:
            self._give_back([block for block in reversed(blocks) if block is not None])
        request.group_blocks = []
        request.n_registered = 0

    # -- what others can find ------------------------------------------------------------------------------------

    def _is_kept(self, request: Request, group: int, i: int) -> bool:
        """Whether block `i` is registered: in newer releases, of a sliding window only where a later prompt can go on.

        That is before the prompt's last token, and where a shared prefix was found to end.
        """
        kind, window = self.groups[group]
        if kind != SLIDING or not self.rules.keeps_windows_where_prompts_end:
            return True
        ends = [(request.prompt_tokens - 1) // self.block_size, request.shared_prefix]
        return any(end - self.window_blocks(window) <= i < end for end in ends)

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
