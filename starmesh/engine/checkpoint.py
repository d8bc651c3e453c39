"""Loads a model directory into ``transformers``' own classes, and refuses what paged execution would get wrong.

Owns the checks: by configuration (encoder-decoders, layer kinds), by looking at what the attention modules ask for
in a trial forward, and by comparing logits with the stock model's (``verify``). A family is supported when it passes;
there is no list of names.
"""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from starmesh.engine.attention import ATTENTION_NAME, UnsupportedAttention
from starmesh.engine.kv_cache import TORCH_DTYPES

_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Largest difference between our logits and the stock model's, as a share of the largest logit.
_TOLERANCES = {"float32": 1e-3, "bfloat16": 8e-2, "float16": 2e-2}


class UnsupportedModel(Exception):
    """The model cannot be served; the message says why and what would do."""


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """The attention of a model, equal in all its layers."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model ready for paged execution. ``reference_logits`` are the stock model's, for ``verify``."""

    model: Any
    shape: AttentionShape
    context_tokens: int
    vocabulary_tokens: int
    eos_token_ids: tuple[int, ...]
    trial_token_ids: tuple[int, ...]
    reference_logits: torch.Tensor


def load_checkpoint(model_dir: Path, *, device: torch.device, dtype: str) -> Checkpoint:
    """Load ``model_dir`` (safetensors only; no remote code runs).

    Raises UnsupportedModel, FileNotFoundError without a ``config.json``, or ValueError for an unknown dtype.
    """
    if dtype not in TORCH_DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(TORCH_DTYPES)}")
    if not (model_dir / "config.json").is_file():
        raise FileNotFoundError(f"{model_dir} holds no config.json: give a directory of a Hugging Face model")
    disable_progress_bar()  # a service's stderr is its log
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    _check_config(config)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_dir,
            config=config,
            dtype=TORCH_DTYPES[dtype],
            attn_implementation=ATTENTION_NAME,
            use_safetensors=True,
            local_files_only=True,
        )
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise UnsupportedModel(f"{config.model_type} models cannot be loaded for paged attention: {reason}") from error
    model = model.to(device).eval().requires_grad_(False)
    parameters = inspect.signature(model.forward).parameters
    if not {"position_ids", "logits_to_keep"} <= set(parameters) or model.get_output_embeddings() is None:
        raise UnsupportedModel(f"{config.model_type} models take no explicit positions or rows of logits to compute")
    trial = tuple((7 * index + 3) % config.vocab_size for index in range(8))
    with torch.inference_mode():
        shape = _attention_shape(model, trial, layers=config.num_hidden_layers)
        model.set_attn_implementation("eager")
        reference = _forward(model, trial)
        model.set_attn_implementation(ATTENTION_NAME)
    return Checkpoint(
        model=model,
        shape=shape,
        context_tokens=int(config.max_position_embeddings),
        vocabulary_tokens=int(config.vocab_size),
        eos_token_ids=_eos_token_ids(model_dir, config),
        trial_token_ids=trial,
        reference_logits=reference,
    )


def verify(checkpoint: Checkpoint, run: Callable[[tuple[int, ...], int], torch.Tensor], *, dtype: str) -> None:
    """Compare ``run(token_ids, start)``, the paged logits of a chunk's last token, with the stock model's.

    The trial tokens go in two chunks and single tokens, as chunked prefill and decode would feed them. Raises
    UnsupportedModel when they differ by more than rounding: then this family does something with its attention that
    the paged path does not know.
    """
    tokens = checkpoint.trial_token_ids
    bounds = [0, 2, 5, *range(6, len(tokens) + 1)]
    for start, end in itertools.pairwise(bounds):
        wanted = checkpoint.reference_logits[end - 1].float()
        error = (run(tokens[start:end], start).float() - wanted).abs().max()
        if not error <= _TOLERANCES[dtype] * wanted.abs().max().clamp(min=1.0):
            raise UnsupportedModel(
                f"{checkpoint.model.config.model_type} models get other logits under paged attention (by {error:.2g}): "
                "this family cannot be served"
            )


def _check_config(config: Any) -> None:
    kind = config.model_type
    if config.is_encoder_decoder or config.get_text_config() is not config:
        raise UnsupportedModel(f"{kind} models are not plain decoder-only text models: give a text-only checkpoint")
    others = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if others:
        raise UnsupportedModel(f"{kind} models have layers without paged KV ({', '.join(sorted(others))})")
    if getattr(config, "use_bidirectional_attention", None) or getattr(config, "is_causal", True) is False:
        raise UnsupportedModel(f"{kind} models with bidirectional attention do not generate token by token")
    missing = [
        name for name in ("num_hidden_layers", "vocab_size", "max_position_embeddings") if not hasattr(config, name)
    ]
    if missing:
        raise UnsupportedModel(f"the config.json of {kind} does not say {', '.join(missing)}")


class _ShapeProbe:
    """A paged step that records what each layer asks for and attends to nothing."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[tuple[int, ...], ...]] = {}

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        softcap: float,
        window: int,
    ) -> torch.Tensor:
        if layer in self.shapes:
            raise UnsupportedAttention(f"layer {layer} attends twice")
        self.shapes[layer] = tuple((tensor.shape[1], tensor.shape[3]) for tensor in (query, key, value))
        return torch.zeros_like(query.transpose(1, 2))


def _attention_shape(model: nn.Module, token_ids: tuple[int, ...], *, layers: int) -> AttentionShape:
    kind = model.config.model_type  # type: ignore[union-attr]
    probe = _ShapeProbe()
    try:
        _forward(model, token_ids, paged_step=probe)
    except UnsupportedAttention as error:
        raise UnsupportedModel(f"{kind} models cannot be served: {error}") from error
    if sorted(probe.shapes) != list(range(layers)):
        raise UnsupportedModel(
            f"{kind} models have layers without paged attention ({len(probe.shapes)} of {layers} have)"
        )
    shapes = set(probe.shapes.values())
    if len(shapes) > 1:
        raise UnsupportedModel(
            f"the layers of this {kind} model differ in heads or head size: KV blocks need one shape"
        )
    (query_heads, query_dim), (kv_heads, key_dim), (value_heads, value_dim) = shapes.pop()
    if kv_heads != value_heads or not query_dim == key_dim == value_dim or query_heads % kv_heads:
        raise UnsupportedModel(f"queries, keys and values of this {kind} model differ in head size")
    return AttentionShape(layers=layers, query_heads=query_heads, kv_heads=kv_heads, head_dim=key_dim)


def _forward(model: Any, token_ids: tuple[int, ...], **kwargs: Any) -> torch.Tensor:
    """Logits [tokens, vocabulary] of one sequence from its start."""
    device = model.get_output_embeddings().weight.device
    logits: torch.Tensor = model(
        input_ids=torch.tensor([token_ids], device=device),
        position_ids=torch.arange(len(token_ids), device=device)[None],
        use_cache=False,
        **kwargs,
    ).logits
    return logits[0]


def _eos_token_ids(model_dir: Path, config: Any) -> tuple[int, ...]:
    """Every token that ends a text: generation_config.json's, then config.json's."""
    found: list[int] = []
    path = model_dir / "generation_config.json"
    sources = [json.loads(path.read_text()).get("eos_token_id")] if path.is_file() else []
    for value in (*sources, getattr(config, "eos_token_id", None)):
        found += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(int(token_id) for token_id in found))
