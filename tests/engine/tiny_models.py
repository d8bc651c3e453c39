"""Tiny random-weight models of each family that the engine is tested with, as directories on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 96
SLIDING_WINDOW = 8

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # logits far enough apart that rounding flips no greedy choice
}
_GEMMA: dict[str, Any] = {**_COMMON, "head_dim": 32}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_COMMON),
    "llama_untied_biased": LlamaConfig(
        **{**_COMMON, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
    ),
    "llama_head_dim_24": LlamaConfig(**{**_COMMON, "head_dim": 24}),  # no multiple of a vector: attends by torch
    "qwen2": Qwen2Config(**_COMMON),
    "qwen3": Qwen3Config(**_COMMON, head_dim=32),
    "gemma": GemmaConfig(**_GEMMA),
    "gemma2": Gemma2Config(
        **_GEMMA,
        sliding_window=SLIDING_WINDOW,
        layer_types=_SLIDING,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
    ),
    "gemma3_text": Gemma3TextConfig(
        **_GEMMA, sliding_window=SLIDING_WINDOW, layer_types=_SLIDING, query_pre_attn_scalar=16
    ),
}


def save_tiny_model(family: str, directory: Path) -> Path:
    """Write the family's model, with the same weights at every call, under ``directory``."""
    target = directory / family
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(CONFIGS[family])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))  # as trained: neither all zeros nor all ones
    model.save_pretrained(target)
    return target
