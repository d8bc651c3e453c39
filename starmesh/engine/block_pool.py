"""KV blocks as numbers: which are free, who holds which, and which full blocks can be found again by content.

Owns reference counts, the free list and the prefix cache. Knows no sequence, no tensor and no policy: the scheduler
decides who gets blocks, ``kv_cache`` holds their bytes.

Each block is in exactly one place::

    free      nobody holds it, its content is worth nothing
    cached    nobody holds it, but a published digest finds it; the least recently used one is evicted first
    used      held by one or more block tables (``references`` of them)
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b


class OutOfBlocks(Exception):
    """More blocks were asked for than ``free_blocks``."""


class IntegrityError(Exception):
    """The pool's books do not balance: a bug in the engine, never in its input."""


def block_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Digest of a full block's tokens and, through ``parent`` (the digest before it, b"" for the first), of all tokens
    before them: equal digests mean equal KV. 32 bytes of BLAKE2b, so that nobody can craft a prompt that collides with
    another's."""
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=32).digest()


class BlockPool:
    """``total_blocks`` blocks of ``block_tokens`` tokens each."""

    def __init__(self, total_blocks: int, *, block_tokens: int) -> None:
        if total_blocks < 1 or block_tokens < 1:
            raise ValueError(f"a pool needs blocks and tokens in them, not {total_blocks} of {block_tokens}")
        self.total_blocks = total_blocks
        self.block_tokens = block_tokens
        # Taken from the end, so that low ids go first and a block just freed is reused while it is warm.
        self._free = list(range(total_blocks - 1, -1, -1))
        self._references = [0] * total_blocks
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    def __repr__(self) -> str:
        cached = len(self._evictable)
        used = self.total_blocks - self.free_blocks
        return f"<BlockPool used={used} cached={cached} free={len(self._free)} of {self.total_blocks}>"

    @property
    def free_blocks(self) -> int:
        """Blocks that ``allocate`` can give: free ones and cached ones."""
        return len(self._free) + len(self._evictable)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold ``tokens`` tokens."""
        return -(-tokens // self.block_tokens)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks, evicting cached ones where needed. Raises OutOfBlocks, taking none."""
        if count > self.free_blocks:
            raise OutOfBlocks(f"{count} blocks asked for, {self.free_blocks} free")
        if count < 1:
            return []
        block_ids = self._free[: -count - 1 : -1]
        del self._free[-count:]
        while len(block_ids) < count:
            block_id, _ = self._evictable.popitem(last=False)
            del self._block_of[self._digest_of.pop(block_id)]
            block_ids.append(block_id)
        references = self._references
        for block_id in block_ids:
            references[block_id] = 1
        return block_ids

    def free(self, block_ids: Sequence[int]) -> None:
        """Give up one reference to each block; a block without references becomes cached if published, else free.

        Raises IntegrityError for a block that nobody holds.
        """
        # The end of a sequence first: it is evicted before the beginning, which more prompts share and without which
        # the rest cannot be found.
        references, digest_of = self._references, self._digest_of
        for block_id in reversed(block_ids):
            left = references[block_id] = references[block_id] - 1
            if left < 0:
                references[block_id] = 0
                raise IntegrityError(f"block {block_id} was freed twice")
            if left == 0:
                if block_id in digest_of:
                    self._evictable[block_id] = None
                else:
                    self._free.append(block_id)

    def publish(self, block_id: int, digest: bytes) -> None:
        """Let ``digest`` find this full block, whose KV is complete. When another block has it already, that one stays
        the one to be found."""
        if self._references[block_id] == 0:
            raise IntegrityError(f"block {block_id} was published but nobody holds it")
        if digest not in self._block_of and block_id not in self._digest_of:
            self._block_of[digest] = block_id
            self._digest_of[block_id] = digest

    def acquire_prefix(self, digests: Iterable[bytes]) -> list[int]:
        """Take a reference to each block of the longest run of ``digests`` that is known, from the first on."""
        block_ids = []
        for digest in digests:
            block_id = self._block_of.get(digest)
            if block_id is None:
                break
            self._references[block_id] += 1
            self._evictable.pop(block_id, None)
            block_ids.append(block_id)
        return block_ids

    def check_integrity(self, tables: Iterable[Iterable[int]]) -> None:
        """Recount everything from ``tables``, the block tables of all holders. Raises IntegrityError."""
        held = Counter(block_id for table in tables for block_id in table)
        for block_id, references in enumerate(self._references):
            if references != held[block_id]:
                raise IntegrityError(f"block {block_id} counts {references} references, {held[block_id]} hold it")
        places = [*self._free, *self._evictable, *held]
        if len(places) != self.total_blocks or len(set(places)) != self.total_blocks:
            raise IntegrityError(
                f"{len(self._free)} free, {len(self._evictable)} cached and {len(held)} used blocks "
                f"are not the {self.total_blocks} of the pool"
            )
        if {block_id: digest for digest, block_id in self._block_of.items()} != self._digest_of:
            raise IntegrityError("the prefix cache's two directions differ")
        if not self._digest_of.keys() >= self._evictable.keys():
            raise IntegrityError("a cached block cannot be found by any digest")
