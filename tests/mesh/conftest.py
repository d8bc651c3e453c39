"""Meshes of real processes: one on a tiny random-weight model for behaviour, one on the default model for exactness."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from starmesh.model_files import fetch_model
from tests.mesh.processes import Mesh


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


@pytest.fixture
async def tiny_mesh(tiny_model_dir: Path, tmp_path: Path) -> AsyncIterator[Mesh]:
    """One prefill, two decode instances and a router on the tiny model."""
    async with Mesh(tmp_path, tiny_model_dir) as mesh:
        await mesh.start_all(flags=("--kv-memory-mib", "16"))
        yield mesh


@pytest.fixture
async def real_mesh(model_dir: Path, tmp_path: Path) -> AsyncIterator[Mesh]:
    """One prefill, two decode instances and a router on the default model."""
    async with Mesh(tmp_path, model_dir) as mesh:
        await mesh.start_all(flags=("--kv-memory-mib", "256"))
        yield mesh
