"""Stores labelled samples of live traffic for training: shards in a directory, up to a size.

Owns what is gathered of sequences that run, its bounds, and when a shard is written, in a thread. Owns neither the
format (``starmesh.prediction.shards``) nor the label's meaning. Stored are hidden states, counts and request ids: no
prompt and no token. Hidden states do tell something of what was said; keep the directory as you would keep that.

Collecting that cannot go on ends with one log line; predicting goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from services.predictor.intake import End, Samples
from starmesh.clock import WallClock
from starmesh.prediction.shards import (
    MANIFEST,
    Manifest,
    SampledSequence,
    ShardDirectory,
    ShardError,
    read_manifest,
    read_stored,
    shard_paths,
)
from starmesh.types import HiddenLayout

log = logging.getLogger(__name__)

SHARD_SEQUENCES: Final = 256
SHARD_BYTES: Final = 16 << 20
SHARD_AGE_S: Final = 60.0
"""A process that is killed loses at most so much."""
RUNNING_BYTES: Final = 256 << 20
"""What is gathered of sequences that run; beyond it the one that was silent for longest is left out."""
UNWRITTEN_BYTES: Final = 64 << 20
"""What may wait for the disk; beyond it sequences are left out."""
_HEADER_BYTES: Final = 4096


@dataclass(slots=True)
class _Running:
    prompt_tokens: int
    states: dict[int, npt.NDArray[np.float16]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(map(_held_bytes, self.states.values()))


def _held_bytes(state: npt.NDArray[np.float16]) -> int:
    """What a state that is gathered takes in memory, with the objects around it."""
    return state.nbytes + 256


class Collector:
    """Collects the samples of the first layout that comes until ``max_bytes`` are stored. Made in a running event loop
    by ``open_collector``."""

    def __init__(self, directory: Path, *, max_bytes: int, stored: tuple[int, int], running_bytes: int) -> None:
        self.samples, self.bytes = stored
        """What the directory holds; samples of sequences that have ended and are about to be written count too."""
        self._directory = directory
        self._max_bytes = max_bytes
        self._max_running_bytes = running_bytes
        self._layout: HiddenLayout | None = None
        self._shards: ShardDirectory | None = None
        self._running: OrderedDict[str, _Running] = OrderedDict()
        self._running_bytes = 0
        self._ended: list[SampledSequence] = []
        self._ended_bytes = 0
        self._left_out = 0
        self._clock = WallClock()
        self._full_shard = asyncio.Event()
        self._closing = False
        self._writing = asyncio.create_task(self._write_all(), name="collector")

    @property
    def collecting(self) -> bool:
        """Whether more samples will be stored."""
        return not self._writing.done() and not self._closing

    def take(self, samples: Samples) -> None:
        """Gather a call's samples. One at the position of an earlier one of its sequence replaces it and all later
        ones."""
        if not self.collecting:
            return
        if self._layout is None:
            self._layout = samples.layout
        if samples.layout != self._layout:
            return
        for row, request_id in enumerate(samples.request_ids):
            prompt_tokens, position = int(samples.prompt_tokens[row]), int(samples.output_tokens[row])
            known = self._running.get(request_id)
            if known is None or known.prompt_tokens != prompt_tokens:
                self._forget(request_id)
                known = self._running[request_id] = _Running(prompt_tokens)
            self._running.move_to_end(request_id)
            while known.states and next(reversed(known.states)) >= position:
                self._running_bytes -= _held_bytes(known.states.popitem()[1])
            # A copy: a view would keep the whole call's samples.
            state = known.states[position] = samples.hidden_states[row].copy()
            self._running_bytes += _held_bytes(state)
        while self._running_bytes > self._max_running_bytes:
            self._forget(next(iter(self._running)))

    def end(self, end: End) -> None:
        """Label and store what was gathered of a sequence; not of one that was cancelled, which may go on elsewhere, or
        be asked for again under the same name."""
        known = self._running.get(end.request_id)
        if known is None:
            return
        self._forget(end.request_id)
        states = {position: state for position, state in known.states.items() if position <= end.output_tokens}
        if not states or end.cancelled or not self.collecting:
            return
        sequence = SampledSequence(
            request_id=end.request_id,
            prompt_tokens=known.prompt_tokens,
            total_output_tokens=end.output_tokens,
            finished=end.finished,
            output_tokens=np.array(list(states), dtype=np.int32),
            hidden_states=np.stack(list(states.values())),
        )
        if self._ended_bytes + sequence.stored_bytes > UNWRITTEN_BYTES:
            self._left_out += 1
            return
        self._ended.append(sequence)
        self._ended_bytes += sequence.stored_bytes
        self.samples += len(states)
        if len(self._ended) >= SHARD_SEQUENCES or self._ended_bytes >= SHARD_BYTES:
            self._full_shard.set()

    async def close(self) -> None:
        """Write what has ended."""
        self._closing = True
        self._full_shard.set()
        await asyncio.wait([self._writing])

    async def _write_all(self) -> None:
        last = False
        while not last:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SHARD_AGE_S):
                    await self._full_shard.wait()
            self._full_shard.clear()
            last = self._closing
            while self._ended:
                sequences, self._ended = self._ended[:SHARD_SEQUENCES], self._ended[SHARD_SEQUENCES:]
                if not await self._write_shard(sequences):
                    self.samples -= sum(len(sequence.output_tokens) for sequence in sequences + self._ended)
                    self._running.clear()
                    self._ended.clear()
                    return

    async def _write_shard(self, sequences: list[SampledSequence]) -> bool:
        """False when no more can be stored, these included."""
        size = sum(sequence.stored_bytes for sequence in sequences)
        self._ended_bytes -= size
        if self._left_out:
            log.warning("%s is written too slowly: %d sequences were left out", self._directory, self._left_out)
            self._left_out = 0
        names = sum(len(sequence.request_id) for sequence in sequences)
        if self.bytes + size + names + _HEADER_BYTES > self._max_bytes:
            log.warning("collecting into %s ends at %d bytes; see --collect-max-mib", self._directory, self.bytes)
            return False
        try:
            self.bytes += await asyncio.to_thread(self._write, sequences)
        except (OSError, ShardError) as error:
            log.error("collecting into %s ends: %s", self._directory, error)
            return False
        except Exception:
            log.exception("collecting into %s ends", self._directory)
            return False
        return True

    def _write(self, sequences: list[SampledSequence]) -> int:
        if self._shards is None:
            assert self._layout is not None, "there are samples"
            self._shards = ShardDirectory(self._directory, _manifest(self._directory, self._layout))
        return self._shards.write(sequences).stat().st_size

    def _forget(self, request_id: str) -> None:
        known = self._running.pop(request_id, None)
        if known is not None:
            self._running_bytes -= known.bytes


async def open_collector(directory: Path, *, max_bytes: int, running_bytes: int = RUNNING_BYTES) -> Collector:
    """A collector that adds to what ``directory`` holds. Raises ShardError for a directory of something else, and
    OSError."""
    stored = await asyncio.to_thread(_stored, directory)
    return Collector(directory, max_bytes=max_bytes, stored=stored, running_bytes=running_bytes)


def _stored(directory: Path) -> tuple[int, int]:
    """Samples and bytes that are there."""
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / MANIFEST).exists():
        read_manifest(directory)
    size = sum(path.stat().st_size for path in shard_paths(directory))
    return sum(sequence.samples for sequence in read_stored(directory)), size


def _manifest(directory: Path, layout: HiddenLayout) -> Manifest:
    """The one that is there, if it is for these samples: who prepared the directory knows more of the requests than
    their samples tell. Else one that says what these tell."""
    if (directory / MANIFEST).exists() and (there := read_manifest(directory)).layout == layout:
        return there
    return Manifest(layout=layout, model=layout.model_revision, dtype="", every_tokens=0)
