"""Settings of all tests, and the models that several kinds of tests serve."""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from starmesh.model_files import fetch_model

# Examples are not timed: on a busy machine any of them may take long.
settings.register_profile("starmesh", deadline=None, max_examples=75, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("starmesh")

# What a shell starts in the background ignores Ctrl-C, and so would the programs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


FAST_LANE = "fast"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The fast lane reads only files with fast tests: the others import torch, which takes longer than the lane."""
    if config.option.markexpr != FAST_LANE or collection_path.suffix != ".py":
        return None
    return True if "pytest.mark.fast" not in collection_path.read_text() else None


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hold the fast lane to its word."""
    if session.config.option.markexpr == FAST_LANE and "torch" in sys.modules:
        raise pytest.UsageError("a test of the fast lane imported torch")


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The default model."""
    return fetch_model()


@pytest.fixture(scope="session")
def tiny_model_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights and the default model's tokenizer: loads at once, steps in a blink."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    directory = tmp_path_factory.mktemp("tiny-model")
    LlamaForCausalLM(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (model_dir / name).exists():
            shutil.copy(model_dir / name, directory / name)
    return directory
