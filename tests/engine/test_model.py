"""The torch executor against transformers' own ``generate``: same tokens, whatever the batch, chunks and blocks."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, T5Config

from starmesh.engine.batch import Batch, BatchItem
from starmesh.engine.model import BrokenLogits, TorchExecutor, UnsupportedModel
from starmesh.types import HiddenLayout, SamplingParams
from tests.engine.tiny_models import CONFIGS, SLIDING_WINDOW, VOCABULARY, save_tiny_model

GREEDY = SamplingParams(max_output_tokens=64, temperature=0.0)
BLOCK_TOKENS = 4
NEW_TOKENS = 14
TOTAL_BLOCKS = 128


@pytest.fixture(scope="module", params=list(CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model_dir(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(family, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("models"))


class Runner:
    """Drives an executor with hand-made batches: several sequences, shuffled block tables, chunked prompts."""

    def __init__(self, executor: TorchExecutor, prompts: list[list[int]], *, seed: int = 0, every: int = 1) -> None:
        """Hidden states are wanted at every ``every``-th token of a sequence."""
        self.executor = executor
        self.every = every
        self.keeps = executor.hidden_layout is not None
        self.prompts = prompts
        self.tokens = [list(prompt) for prompt in prompts]
        self.done = [0] * len(prompts)
        blocks = list(range(executor.total_blocks))
        random.Random(seed).shuffle(blocks)
        share = len(blocks) // len(prompts)
        self.tables = [blocks[i * share : (i + 1) * share] for i in range(len(prompts))]
        self.hidden_states: list[list[torch.Tensor]] = [[] for _ in prompts]

    def item(self, index: int, count: int, sampling: SamplingParams = GREEDY) -> BatchItem:
        """The next ``count`` tokens of a sequence; it samples when they reach its last token."""
        start, tokens = self.done[index], self.tokens[index]
        end = min(start + count, len(tokens))
        return BatchItem(
            request_id=f"r{index}",
            token_ids=tokens[start:end],
            start=start,
            block_ids=self.tables[index],
            sampling=sampling,
            history=tuple(tokens) if end == len(tokens) else None,
            wants_hidden_state=self.keeps and end == len(tokens) and (len(tokens) + index) % self.every == 0,
        )

    def step(self, counts: dict[int, int], sampling: SamplingParams = GREEDY) -> None:
        items = [self.item(index, count, sampling) for index, count in counts.items()]
        result = self.executor.execute(Batch(tuple(items)))
        wanting = [item for item in items if item.wants_hidden_state]
        assert (result.hidden_states is None) == (not wanting)
        rows = iter(result.hidden_states if wanting else ())
        for index, item, token_id in zip(counts, items, result.token_ids, strict=True):
            self.done[index] += len(item.token_ids)
            assert (token_id is None) == (not item.samples)
            if token_id is not None:
                self.tokens[index].append(token_id)
                if item.wants_hidden_state:
                    self.hidden_states[index].append(next(rows))
        assert next(rows, None) is None

    def run_staggered(self, new_tokens: int) -> list[list[int]]:
        """Sequence i joins at step 2 i with chunks of i + 2 tokens; decode and prefill share steps."""
        goal = [len(prompt) + new_tokens for prompt in self.prompts]
        for turn in itertools.count():
            live = [i for i in range(len(self.prompts)) if len(self.tokens[i]) < goal[i] and turn >= 2 * i]
            if not live and turn >= 2 * len(self.prompts):
                break
            if live:
                self.step({i: i + 2 for i in live})
        return [tokens[len(prompt) :] for tokens, prompt in zip(self.tokens, self.prompts, strict=True)]


def make_prompts(*lengths: int) -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(VOCABULARY) for _ in range(length)] for length in lengths]


def load(model_dir: Path, **settings: Any) -> TorchExecutor:
    return TorchExecutor.load(model_dir, total_blocks=TOTAL_BLOCKS, block_tokens=BLOCK_TOKENS, **settings)


@pytest.mark.parametrize("use_native", [True, False], ids=["native", "torch"])
def test_ragged_chunked_batches_equal_generate(model_dir: Path, use_native: bool) -> None:
    prompts = make_prompts(1, 5, 12, 23)
    executor = load(model_dir, use_native=use_native, hidden_layers=(1, 3))
    runner = Runner(executor, prompts)
    outputs = runner.run_staggered(NEW_TOKENS)

    reference = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager")
    for index, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        wanted = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
        )[0, len(prompt) :].tolist()
        assert outputs[index] == wanted
        with torch.inference_mode():
            stock = reference.model(torch.tensor([prompt + wanted]), output_hidden_states=True).hidden_states
        # After one layer, and after the last norm.
        states = torch.stack([stock[layer][0, len(prompt) - 1 : -1] for layer in (1, 3)], dim=1)
        torch.testing.assert_close(torch.stack(runner.hidden_states[index]), states, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_native", [True, False], ids=["native", "torch"])
def test_keeping_hidden_states_changes_no_bit(model_dir: Path, use_native: bool) -> None:
    """All layers, some, or none, at all tokens or some: the same logits, and the same states where they are kept."""
    prompts = make_prompts(1, 5, 12)
    logits: list[list[torch.Tensor]] = []
    runners = []
    for hidden_layers, every in (((), 1), ((1, 2, 3), 1), ((2,), 3), ((3,), 1)):
        executor = load(model_dir, use_native=use_native, hidden_layers=hidden_layers)
        executor.hf_model.get_output_embeddings().register_forward_hook(_recorder(logits))
        runners.append(Runner(executor, prompts, every=every))
        runners[-1].run_staggered(NEW_TOKENS)
    none, every_layer, middle, last = runners
    assert none.tokens == every_layer.tokens == middle.tokens == last.tokens
    assert none.hidden_states == [[], [], []]
    steps = len(logits) // len(runners)
    for step in range(steps):
        assert all(torch.equal(logits[step], logits[step + steps * n]) for n in range(1, len(runners)))
    for index, prompt in enumerate(prompts):
        states = torch.stack(every_layer.hidden_states[index])
        assert states.shape == (NEW_TOKENS, 3, 64)
        assert torch.equal(torch.stack(last.hidden_states[index]), states[:, 2:])
        due = [row for row in range(NEW_TOKENS) if (len(prompt) + row + index) % 3 == 0]
        assert torch.equal(torch.stack(middle.hidden_states[index]), states[due, 1:2])


def _recorder(found: list[Any]) -> Any:
    return lambda module, inputs, output: found.append(output.clone())


def test_layers_that_are_not_there_are_refused(llama_dir: Path) -> None:
    with pytest.raises(ValueError, match="hidden layers 4: the model has 3; name some of 1 to 3, or none"):
        load(llama_dir, hidden_layers=(1, 4))
    executor = load(llama_dir, hidden_layers=())
    assert executor.hidden_layout is None
    item = BatchItem("r", [1], 0, [0], GREEDY, (1,), wants_hidden_state=True)
    with pytest.raises(ValueError, match="keeps none"):
        executor.execute(Batch((item,)))


def test_a_step_that_fails_leaves_no_rows_for_the_next(llama_dir: Path) -> None:
    executor = load(llama_dir)
    wanting = BatchItem("r", [3, 4, 5], 0, [0], GREEDY, (3, 4, 5), wants_hidden_state=True)
    layer = executor.hf_model.model.layers[1]
    hook = layer.register_forward_pre_hook(_fail)
    with pytest.raises(MemoryError):
        executor.execute(Batch((wanting,)))
    hook.remove()
    alone = executor.execute(Batch((BatchItem("r", [3], 0, [0], GREEDY, (3,)),)))
    assert alone.hidden_states is None
    assert executor.execute(Batch((wanting,))).hidden_states.shape == (1, 2, 64)


def _fail(module: Any, inputs: Any) -> None:
    raise MemoryError


def test_logits_equal_the_stock_model(model_dir: Path) -> None:
    (prompt,) = make_prompts(4 * SLIDING_WINDOW + 3)
    executor = load(model_dir)
    items = (BatchItem("r", prompt[:20], 0, range(30, 40)), BatchItem("r", prompt[20:], 20, range(30, 40)))
    with torch.inference_mode():
        executor._forward(items[:1], [0], [])
        logits, _ = executor._forward(items[1:], [0], [])
        reference = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager")
        wanted = reference(torch.tensor([prompt])).logits[0, -1:]
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


def test_native_forwards_are_the_same_bits_in_any_batch(llama_dir: Path) -> None:
    executor = load(llama_dir)
    if not executor.attends_natively:
        pytest.skip("no C++ compiler here")
    prompts = make_prompts(9, 17, 6, 30, 2, 11, 8)
    together = Runner(executor, prompts)
    together.run_staggered(NEW_TOKENS)
    for index, prompt in enumerate(prompts):
        alone = Runner(executor, [prompt], seed=index + 1)
        alone.step({0: len(prompt)})
        for _ in range(NEW_TOKENS - 1):
            alone.step({0: 1})
        assert alone.tokens[0] == together.tokens[index]
        assert torch.equal(torch.stack(alone.hidden_states[0]), torch.stack(together.hidden_states[index]))


@pytest.mark.parametrize("use_native", [True, False], ids=["native", "torch"])
def test_bfloat16_stays_close_to_the_stock_model(model_dir: Path, use_native: bool) -> None:
    (prompt,) = make_prompts(21)
    executor = load(model_dir, dtype="bfloat16", use_native=use_native)
    assert executor.memory.pool.dtype == torch.bfloat16
    with torch.inference_mode():
        logits, _ = executor._forward((BatchItem("r", prompt, 0, range(8)),), [0], [])
        stock = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16, attn_implementation="eager")
        wanted = stock(torch.tensor([prompt])).logits[0, -1:]
    torch.testing.assert_close(logits, wanted, rtol=0.05, atol=0.05 * float(wanted.abs().max()))


def test_blocks_carried_over_continue_the_sequence(llama_dir: Path) -> None:
    (prompt,) = make_prompts(13)
    source, target = load(llama_dir), load(llama_dir)
    undisturbed = Runner(source, [prompt])
    undisturbed.step({0: len(prompt)})
    moved = Runner(target, [prompt], seed=5)
    for ours, theirs in zip(undisturbed.tables[0], moved.tables[0], strict=True):
        target.memory.write_block(theirs, 0, source.memory.read_block(ours))
    moved.tokens = [list(undisturbed.tokens[0])]
    moved.done = list(undisturbed.done)
    for _ in range(8):
        undisturbed.step({0: 1})
        moved.step({0: 1})
    assert moved.tokens == undisturbed.tokens
    assert all(map(torch.equal, moved.hidden_states[0], undisturbed.hidden_states[0][1:]))


def test_sampled_tokens_do_not_depend_on_batch_mates(llama_dir: Path) -> None:
    sampling = SamplingParams(
        max_output_tokens=64, temperature=0.9, top_p=0.9, top_k=40, repetition_penalty=1.2, seed=5
    )
    prompts = make_prompts(7, 12, 3)
    executor = load(llama_dir)
    together = Runner(executor, prompts)
    for _ in range(24):
        together.step({0: 5, 1: 3, 2: 9}, sampling)
    alone = Runner(executor, prompts[1:2], seed=1)
    while len(alone.tokens[0]) < len(together.tokens[1]):
        alone.step({0: 12}, sampling)
    assert alone.tokens[0] == together.tokens[1]


def test_what_the_executor_says_of_the_model(llama_dir: Path) -> None:
    (llama_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9]}))
    executor = TorchExecutor.load(llama_dir, kv_memory_bytes=10_000, block_tokens=BLOCK_TOKENS)
    layout = executor.layout
    assert (layout.layers, layout.kv_heads, layout.head_dim, layout.dtype) == (3, 2, 16, "float32")
    assert executor.total_blocks == 10_000 // layout.block_bytes == 3
    assert executor.context_tokens == 128
    assert executor.vocabulary_tokens == VOCABULARY
    assert executor.eos_token_ids == (5, 9)
    assert executor.hidden_layout == HiddenLayout(layout.model_revision, (2, 3), 64)
    assert executor.hidden_layout.state_bytes == 2 * 64 * 2


def test_a_step_without_sampling_rows(llama_dir: Path) -> None:
    executor = load(llama_dir)
    result = executor.execute(Batch((BatchItem("r", [1, 2, 3], 0, [7]),)))
    assert result.token_ids == (None,)
    assert result.hidden_states is None


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (BatchItem("r", [1, 2, 3, 4, 5], 0, [0]), "do not fit"),
        (BatchItem("r", [1], 4, [0]), "do not fit"),
        (BatchItem("r", [], 0, [0]), "do not fit"),
        (BatchItem("r", [1], 0, [TOTAL_BLOCKS]), "outside the pool"),
        (BatchItem("r", [1], 0, [-1]), "outside the pool"),
    ],
)
def test_batches_that_would_touch_foreign_memory_are_refused(llama_dir: Path, item: BatchItem, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(llama_dir).execute(Batch((item,)))


def test_broken_weights_fail_the_step(llama_dir: Path) -> None:
    executor = load(llama_dir)
    with torch.no_grad():
        executor.hf_model.get_input_embeddings().weight[3] = torch.nan
    with pytest.raises(BrokenLogits, match="request bad"):
        executor.execute(Batch((BatchItem("bad", [3], 0, [0], GREEDY, (3,)),)))


def test_models_that_paged_attention_cannot_serve_are_refused(tmp_path: Path, llama_dir: Path) -> None:
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(UnsupportedModel, match="decoder-only"):
        load(tmp_path / "t5")
    layers = json.loads((llama_dir / "config.json").read_text()) | {"layer_types": ["linear_attention"] * 3}
    (tmp_path / "linear").mkdir()
    (tmp_path / "linear" / "config.json").write_text(json.dumps(layers))
    with pytest.raises(UnsupportedModel, match="linear_attention"):
        load(tmp_path / "linear")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load(tmp_path)


def test_a_family_without_tests_of_its_own_is_checked_against_the_stock_model(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    executor = load(tmp_path / "gpt2")
    assert executor.layout.kv_heads == 4
    assert executor.hidden_layout is not None
    assert (executor.hidden_layout.layers, executor.hidden_layout.width) == ((1, 2), 64)


def test_memory_is_given_one_way(llama_dir: Path) -> None:
    with pytest.raises(ValueError, match="either"):
        TorchExecutor.load(llama_dir)
    with pytest.raises(ValueError, match="more KV memory"):
        TorchExecutor.load(llama_dir, kv_memory_bytes=10)
