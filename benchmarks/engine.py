"""Decode and prefill speed against plain transformers: `python -m benchmarks.engine [--quick] [--model DIR]`.

Ours: the engine core over the torch executor, in float32 on one thread. Theirs: ``generate`` of transformers on the
same weights, one thread, batched with left padding, KV cache on, attention as transformers chooses (SDPA). Rounds
interleave both and a measure of the memory's read bandwidth, so that all share whatever else the machine does.

A decode step's time is from one choice of tokens to the next; prompts differ in length and are not part of it.
``bandwidth_fraction`` is bytes of weights read per step over step time over read bandwidth, each of the same round: 1
is a step that does nothing but read the weights once. Both sides get random token ids and ignore EOS.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers

from benchmarks import machine
from starmesh.clock import WallClock
from starmesh.engine.engine import EngineConfig, EngineCore, StopChecker
from starmesh.engine.model import TorchExecutor
from starmesh.model_files import fetch_model
from starmesh.types import SamplingParams, SequenceSpec

BATCHES = (1, 8, 32)
MAX_BATCH = max(BATCHES)
BANDWIDTH_BYTES = 512 << 20
KV_TOKENS = 24 * 1024
QUICK_BUDGET_S = 40.0


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Ours:
    """``MAX_BATCH`` sequences in one engine; those outside a batch under test are held with their blocks."""

    def __init__(self, model_dir: Path, prompts: list[list[int]], *, step_tokens: int) -> None:
        self.executor = TorchExecutor.load(model_dir, total_blocks=KV_TOKENS // 16)
        config = EngineConfig(
            eos_token_ids=frozenset(),
            max_sequence_tokens=self.executor.context_tokens,
            max_step_tokens=step_tokens,
            max_sequences=MAX_BATCH,
        )
        self.core = EngineCore(self.executor, config, stop_checker=_no_stop_strings, clock=WallClock())
        self.names = [self.add(f"r{index}", prompt) for index, prompt in enumerate(prompts)]
        pending = set(self.names)
        while pending:
            pending -= {output.request_id for output in self.core.step()}

    def add(self, name: str, prompt: list[int]) -> str:
        sampling = SamplingParams(max_output_tokens=4096, temperature=0.0, ignore_eos=True)
        self.core.add(SequenceSpec(name, 1, tuple(prompt), (), sampling))
        return name

    def decode(self, batch: int, steps: int) -> list[float]:
        """Seconds of each of ``steps`` steps with ``batch`` sequences."""
        held = self.names[batch:]
        for name in held:
            self.core.export(name)
        times = []
        for _ in range(steps + 1):
            started = time.perf_counter()
            outputs = self.core.step()
            times.append(time.perf_counter() - started)
            assert len(outputs) == batch, outputs
        for name in held:
            self.core.resume(name)
        return times[1:]  # the first also pays for the change of batch

    def prefill(self, prompt: list[int]) -> float:
        """Seconds from a prompt to its first token, alone in the engine."""
        for name in self.names:
            self.core.export(name)
        started = time.perf_counter()
        self.add("prefill", prompt)
        while not self.core.step():
            pass
        elapsed = time.perf_counter() - started
        self.core.cancel("prefill")
        for name in self.names:
            self.core.resume(name)
        return elapsed


class Theirs:
    """Stock ``generate``; a logits processor notes when each step's logits are there."""

    def __init__(self, model_dir: Path, prompts: list[list[int]]) -> None:
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        self.prompts = prompts

    def decode(self, batch: int, steps: int) -> list[float]:
        width = max(map(len, self.prompts[:batch]))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in self.prompts[:batch]])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in self.prompts[:batch]])
        stamps: list[float] = []

        def note(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            stamps.append(time.perf_counter())
            return scores

        self._generate(ids, mask, note, steps + 2)
        return [end - start for start, end in itertools.pairwise(stamps[1:])]

    def prefill(self, prompt: list[int]) -> float:
        ids = torch.tensor([prompt])
        started = time.perf_counter()
        self._generate(ids, torch.ones_like(ids), None, 1)
        return time.perf_counter() - started

    def _generate(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        note: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None,
        new_tokens: int,
    ) -> None:
        self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            logits_processor=transformers.LogitsProcessorList([note] if note else []),
        )


def read_bandwidth(buffer: torch.Tensor) -> float:
    """Bytes a second that one thread reads from memory: the better of a sum and a dot product over ``buffer``."""
    rates = []
    half = buffer.numel() // 2
    for read in (torch.sum, lambda numbers: torch.dot(numbers[:half], numbers[half:])):
        started = time.perf_counter()
        read(buffer)
        rates.append(buffer.nbytes / (time.perf_counter() - started))
    return max(rates)


def step_weight_bytes(model: Any) -> int:
    """Bytes of weights that one step reads: all, but of an input embedding of its own only a few rows."""
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    whole: int = sum(parameter.nbytes for parameter in model.parameters())
    embedding: int = model.get_input_embeddings().weight.nbytes
    return whole if tied else whole - embedding


def rounds(quick: bool) -> Iterator[int]:
    started, count = time.perf_counter(), 7
    for index in range(count):
        elapsed = time.perf_counter() - started
        if quick and index and elapsed * (index + 1) / index > QUICK_BUDGET_S:
            return
        yield index


def measure(model_dir: Path, *, quick: bool) -> dict[str, Any]:
    rng = random.Random(0)
    lengths = (4, 12) if quick else (64, 192)
    steps, prefill_tokens = (4, 128) if quick else (12, 512)
    report("loading ...")
    theirs = Theirs(model_dir, [])
    vocabulary = theirs.model.config.vocab_size
    theirs.prompts = [[rng.randrange(vocabulary) for _ in range(rng.randint(*lengths))] for _ in range(MAX_BATCH)]
    long_prompt = [rng.randrange(vocabulary) for _ in range(prefill_tokens)]
    ours = Ours(model_dir, theirs.prompts, step_tokens=512)
    buffer = torch.ones(BANDWIDTH_BYTES // 4)
    weight_bytes = step_weight_bytes(theirs.model)

    ours_s: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    theirs_s: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    fractions: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    bandwidths, ours_prefill, theirs_prefill = [], [], []
    for index in rounds(quick):
        for batch in BATCHES:
            before = read_bandwidth(buffer)
            mine = ours.decode(batch, steps)
            bandwidth = (before + read_bandwidth(buffer)) / 2
            other = theirs.decode(batch, steps)
            step_s = statistics.median(mine)
            ours_s[batch] += mine
            theirs_s[batch] += other
            bandwidths.append(bandwidth)
            fractions[batch].append(weight_bytes / step_s / bandwidth)
            report(
                f"round {index} batch {batch:2}: {1e3 * step_s:6.1f} ms a step, transformers "
                f"{1e3 * statistics.median(other):6.1f} ms, {fractions[batch][-1]:.0%} of {bandwidth / 1e9:.1f} GB/s"
            )
        ours_prefill.append(prefill_tokens / ours.prefill(long_prompt))
        theirs_prefill.append(prefill_tokens / theirs.prefill(long_prompt))
        report(f"round {index} prefill: {ours_prefill[-1]:.0f} tokens/s, transformers {theirs_prefill[-1]:.0f}")

    def rates(step_times: dict[int, list[float]]) -> dict[int, list[float]]:
        return {batch: [batch / seconds for seconds in times] for batch, times in step_times.items()}

    decode, stock = rates(ours_s), rates(theirs_s)
    return {
        "benchmark": "engine",
        "decode_tokens_per_s": _medians(decode),
        "transformers_tokens_per_s": _medians(stock),
        "speedup": {str(b): round(statistics.median(theirs_s[b]) / statistics.median(ours_s[b]), 2) for b in BATCHES},
        "bandwidth_fraction": _medians(fractions),
        "prefill_tokens_per_s": round(statistics.median(ours_prefill), 1),
        "transformers_prefill_tokens_per_s": round(statistics.median(theirs_prefill), 1),
        "read_gb_per_s": round(statistics.median(bandwidths) / 1e9, 2),
        "spread": {
            "decode_tokens_per_s": _spreads(decode),
            "transformers_tokens_per_s": _spreads(stock),
            "bandwidth_fraction": _spreads(fractions),
            "prefill_tokens_per_s": _spread(ours_prefill),
            "transformers_prefill_tokens_per_s": _spread(theirs_prefill),
        },
        "rounds": len(ours_prefill),
        "steps": steps,
        "prompt_tokens": list(lengths),
        "prefill_tokens": prefill_tokens,
        "weight_bytes": weight_bytes,
        "native": ours.executor.attends_natively,
        "model": model_dir.name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": machine.describe(),
        "commit": machine.commit("starmesh/engine", "benchmarks"),
    }


def _medians(values: dict[int, list[float]]) -> dict[str, float]:
    return {str(batch): round(statistics.median(samples), 3) for batch, samples in values.items()}


def _spreads(values: dict[int, list[float]]) -> dict[str, list[float]]:
    return {str(batch): _spread(samples) for batch, samples in values.items()}


def _spread(samples: list[float]) -> list[float]:
    return [round(value, 3) for value in (min(samples), statistics.median(samples), max(samples))]


def _no_stop_strings(spec: SequenceSpec) -> StopChecker:
    raise AssertionError(f"{spec.request_id} has stop strings")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short prompts and fewer rounds: under a minute")
    parser.add_argument("--model", type=Path, help="a model's directory (default: the project's default model)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model_dir = arguments.model or fetch_model(progress=report)
    print(json.dumps(measure(model_dir, quick=arguments.quick)))


if __name__ == "__main__":
    main()
