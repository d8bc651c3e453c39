"""Derives a profile from a model's shape and an accelerator's datasheet. Pure formulas; nothing is measured.

A decode step reads the weights and the KV of the batch from memory once, at a part of the datasheet's bandwidth; what
is computed is multiplied out at a part of its peak. Both are added up, as ``CostModel`` is linear: where a step is
bound by memory, part of the computing hides behind the reading, so large batches come out somewhat slow. With several
accelerators an instance is tensor parallel: weights, KV and work are split evenly, and each layer ends attention and
MLP with an all-reduce. Owns the formulas and their assumptions; the tables are ``shipped``'s.
"""

from __future__ import annotations

from dataclasses import dataclass

from starmesh.policy.cost import CostModel
from starmesh.profiles.profile import Link, Profile, ProfileError
from starmesh.profiles.term import Term, given
from starmesh.types import KvLayout

_SIGNIFICANT_DIGITS = 5
_ELEMENT = given(2, "B of bf16")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A dense decoder in bfloat16 whose input embedding and output projection are two tables of their own.

    ``parameters`` counts all; ``hidden`` is also the width of all query heads together.
    """

    name: str
    parameters: float
    layers: int
    hidden: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """What a datasheet says of one accelerator: bytes, bytes per second and dense bf16 FLOPS; ``nvlink_bytes_per_s``
    and ``network_bytes_per_s`` (its share of the machine's network) are of one direction."""

    name: str
    source: str
    memory_bytes: float
    memory_bytes_per_s: float
    flops: float
    network: str
    network_bytes_per_s: float
    nvlink_bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What no datasheet says; all our choice. ``shipped.PUBLISHED`` compares what comes of it with measurements.

    Efficiencies are parts of the datasheet's figure. ``step_overhead_s`` and ``sequence_overhead_s`` are the host's
    (scheduling, launches, sampling) for a step and each of its sequences; ``all_reduce_s`` is one small all-reduce
    inside a CUDA graph. ``reserve_bytes`` of each accelerator are for activations, CUDA graphs and the driver.
    A transfer is set up by ``setup_messages`` messages and two calls of the ledger.
    """

    memory_efficiency: float = 0.8
    flops_efficiency: float = 0.6
    network_efficiency: float = 0.9
    step_overhead_s: float = 1e-3
    sequence_overhead_s: float = 5e-6
    all_reduce_s: float = 10e-6
    memory_part: float = 0.9
    reserve_bytes: float = 3e9
    message_s: float = 0.2e-3
    setup_messages: int = 8
    ledger_call_s: float = 0.5e-3
    step_noise: float = 0.02
    block_tokens: int = 16
    max_sequences: int = 256
    max_step_tokens: int = 2048


ASSUMPTIONS = Assumptions()


def derive(
    name: str,
    model: ModelShape,
    accelerator: Accelerator,
    *,
    count: int = 1,
    assume: Assumptions = ASSUMPTIONS,
    compared: str = "",
) -> Profile:
    """The profile of ``model`` on ``count`` accelerators. ``compared`` is added to what it says of itself.

    Raises ProfileError for a model that does not fit.
    """
    terms = _terms(model, accelerator, count, assume)
    blocks = int(terms["total_blocks"].value)
    if blocks < 1:
        raise ProfileError(f"{model.name} does not fit {count} {accelerator.name}: take more of them for an instance")
    limit = min(model.context_tokens, blocks * assume.block_tokens)
    ours = "our choice: vLLM's default on most accelerators"
    given_by_model = "the model's config.json"
    provenance = {
        "profile": _description(model, accelerator, count) + compared,
        "total_blocks": f"derived: whole ones of {terms['total_blocks'].text}",
        "max_sequences": ours,
        "max_step_tokens": ours,
        "max_sequence_tokens": f"{given_by_model} ({model.context_tokens}), and no more than the blocks hold",
        "step_noise": "assumed, not measured",
        **{key: _origin(term) for key, term in terms.items() if key != "total_blocks"},
        **dict.fromkeys(("layout.layers", "layout.kv_heads", "layout.head_dim"), given_by_model),
        "layout.block_tokens": ours,
    }
    return Profile(
        name=name,
        cost=_cost(terms),
        layout=KvLayout(
            model_revision=model.name,
            dtype="bfloat16",
            layers=model.layers,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            block_tokens=assume.block_tokens,
        ),
        total_blocks=blocks,
        link=Link(_stored(terms["link.bytes_per_s"]), _stored(terms["link.latency_s"])),
        max_sequences=assume.max_sequences,
        max_step_tokens=assume.max_step_tokens,
        max_sequence_tokens=limit,
        step_noise=assume.step_noise,
        provenance=provenance,
    )


def derive_cost(model: ModelShape, accelerator: Accelerator, *, count: int = 1) -> CostModel:
    """The costs alone, whether or not the model leaves room for KV."""
    return _cost(_terms(model, accelerator, count, ASSUMPTIONS))


def _cost(terms: dict[str, Term]) -> CostModel:
    names = (key for key in terms if key.startswith("cost."))
    return CostModel(**{name.removeprefix("cost."): _stored(terms[name]) for name in names})


def _origin(term: Term) -> str:
    return term.text if term.is_given else f"derived: {_stored(term):g} = {term.text}"


def _stored(term: Term) -> float:
    """As it goes into files: more digits would say more than the assumptions do."""
    return float(f"{term.value:.{_SIGNIFICANT_DIGITS}g}")


def _terms(model: ModelShape, accelerator: Accelerator, count: int, assume: Assumptions) -> dict[str, Term]:
    """The formulas, by the names of ``Profile.provenance``."""
    many = given(count, "accelerator" if count == 1 else "accelerators")
    parameters = given(model.parameters, "parameters")
    table = given(model.vocabulary * model.hidden, "of the input embedding")
    both = given(2 * model.vocabulary * model.hidden, "of input embedding and output projection")
    read = many * given(accelerator.memory_bytes_per_s, "B/s of memory") * _assumed(assume.memory_efficiency)
    compute = many * given(accelerator.flops, "FLOPS in bf16") * _assumed(assume.flops_efficiency)
    kv_bytes = (
        given(2, "(key, value)")
        * given(model.layers, "layers")
        * given(model.kv_heads, "heads")
        * given(model.head_dim, "elements")
        * _ELEMENT
    )
    multiply_add = given(2, "FLOP")

    # The input embedding is looked up, not read through; prompts need the output projection for one token only.
    step_base = (parameters - table) * _ELEMENT / read + given(assume.step_overhead_s, "s of the host, assumed")
    step_sequence = multiply_add * (parameters - table) / compute
    prefill_token = multiply_add * (parameters - both) / compute
    if count > 1:
        assert accelerator.nvlink_bytes_per_s is not None
        all_reduces = given(2, "all-reduces") * given(model.layers, "layers")
        step_base += all_reduces * given(assume.all_reduce_s, "s of latency, assumed")
        # A ring moves 2 (n - 1) / n of the data over each link.
        moved = given(2 * (count - 1) / count, "times") * given(model.hidden, "elements") * _ELEMENT
        links = given(accelerator.nvlink_bytes_per_s, "B/s of NVLink") * _assumed(assume.memory_efficiency)
        step_sequence += all_reduces * moved / links
        prefill_token += all_reduces * moved / links

    kv_memory = (
        many
        * (
            given(accelerator.memory_bytes, "B of memory") * _assumed(assume.memory_part)
            - given(assume.reserve_bytes, "B in reserve, assumed")
        )
        - parameters * _ELEMENT
    )
    network = (
        many
        * given(accelerator.network_bytes_per_s, f"B/s of {accelerator.network}")
        * _assumed(assume.network_efficiency)
    )
    message = given(assume.message_s, "s per message, assumed")
    setup = given(assume.setup_messages, "messages") * message
    return {
        "total_blocks": kv_memory / (kv_bytes * given(assume.block_tokens, "tokens of a block")),
        "cost.step_base_s": step_base,
        "cost.step_sequence_s": step_sequence + given(assume.sequence_overhead_s, "s of the host, assumed"),
        "cost.step_token_s": kv_bytes / read,
        "cost.transfer_setup_s": setup + given(2, "calls") * given(assume.ledger_call_s, "s of the ledger, assumed"),
        "cost.transfer_bytes_per_s": network,
        "cost.prefill_token_s": prefill_token,
        # Each query head's product of query and key, and of weight and value.
        "cost.prefill_pair_s": given(4, "FLOP")
        * given(model.layers, "layers")
        * given(model.hidden, "elements")
        / compute,
        "link.bytes_per_s": network,
        "link.latency_s": message,
    }


def _assumed(part: float) -> Term:
    return given(part, "assumed")


def _description(model: ModelShape, accelerator: Accelerator, count: int) -> str:
    machine = accelerator.name if count == 1 else f"{count} {accelerator.name}, tensor parallel as one instance"
    return f"Derived, not measured: {model.name} in bf16 on {machine}. Datasheet: {accelerator.source}."
