"""SmolLM2 from GGUF to the layout of the Hugging Face hub.

Owns the two things in which the formats differ beyond names: GGUF's quantised tensors, and the order of the rows
of the query and key projections. Knows one model, whose file ``packaged`` pins; needs ``gguf`` and ``safetensors``
(of ``starmesh[engine]``), not torch.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_LAYER_TENSORS: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CACHE_LINE_BYTES: Final = 64
_CONTROL_TOKEN = 3  # tokenizer.ggml.token_type of a special token


def convert_gguf(source: Path, target: Path) -> None:
    """Write configuration, tokenizer and float32 weights of the GGUF file ``source`` into ``target``."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    weights: dict[str, NDArray[np.float32]] = {}
    for tensor in reader.tensors:
        weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        match tensor.name.split("."):
            case ["blk", layer, kind, "weight"]:
                if kind in heads:
                    weight = _rotary_halves(weight, heads[kind])
                weights[f"model.layers.{layer}.{_LAYER_TENSORS[kind]}.weight"] = weight
            case ["token_embd", "weight"]:  # also the output projection: the embedding is tied
                weights["model.embed_tokens.weight"] = weight
            case ["output_norm", "weight"]:
                weights["model.norm.weight"] = weight
            case _:
                raise ValueError(f"{source.name} has an unknown tensor {tensor.name!r}")
    weights_file = target / "model.safetensors"
    save_file(weights, weights_file, metadata={"format": "pt"})
    _align(weights_file)
    for name, content in _json_files(fields).items():
        (target / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _align(weights_file: Path) -> None:
    """Pad the header, which safetensors allows, so that the tensors begin on a cache line.

    The engine's kernels then read them where they are mapped, and all instances of a machine share them.
    """
    padded = weights_file.with_suffix(".padded")
    with weights_file.open("rb") as source, padded.open("wb") as target:
        size = int.from_bytes(source.read(8), "little")
        padding = -(8 + size) % _CACHE_LINE_BYTES
        target.write((size + padding).to_bytes(8, "little") + source.read(size) + b" " * padding)
        shutil.copyfileobj(source, target, 1024 * 1024)
    padded.replace(weights_file)


def _rotary_halves(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder the rows [heads * head_dim, hidden] of a query or key projection.

    llama.cpp rotates neighbouring rows (0, 1), (2, 3), ... of a head together; transformers rotates row i of the
    first half with row i of the second, as its checkpoints have it.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def _json_files(fields: dict[str, Any]) -> dict[str, Any]:
    """The JSON files by name, from the GGUF metadata."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    bos, eos = fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]
    pad, unknown = fields["tokenizer.ggml.padding_token_id"], fields["tokenizer.ggml.unknown_token_id"]
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    return {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "float32",
            "attention_bias": False,
            "hidden_act": "silu",
            "hidden_size": fields["llama.embedding_length"],
            "intermediate_size": fields["llama.feed_forward_length"],
            "max_position_embeddings": fields["llama.context_length"],
            "mlp_bias": False,
            "num_attention_heads": fields["llama.attention.head_count"],
            "num_hidden_layers": fields["llama.block_count"],
            "num_key_value_heads": fields["llama.attention.head_count_kv"],
            # GGUF stores a float32, which would not print as the 1e-5 that was meant.
            "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 12),
            "rope_theta": fields["llama.rope.freq_base"],
            "tie_word_embeddings": True,
            "vocab_size": fields["llama.vocab_size"],
            **ids,
        },
        "generation_config.json": ids,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[bos],
            "eos_token": tokens[eos],
            "pad_token": tokens[pad],
            "unk_token": tokens[unknown],
            "clean_up_tokenization_spaces": False,
            "model_max_length": fields["llama.context_length"],
            "chat_template": fields["tokenizer.chat_template"],
        },
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": token_id,
                    "content": tokens[token_id],
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for token_id, kind in enumerate(fields["tokenizer.ggml.token_type"])
                if kind == _CONTROL_TOKEN
            ],
            "normalizer": None,
            # What "smollm" in tokenizer.ggml.pre stands for: digits alone, then GPT-2's byte-level split.
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level()],
            },
            "post_processor": None,
            "decoder": _byte_level(),
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {token: token_id for token_id, token in enumerate(tokens)},
                "merges": [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]],
            },
        },
    }


def _byte_level() -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
