"""Drop-in layers by ``native.cpp`` for float32 models on a CPU: same parameters, same results to rounding.

Owns which stock layers are replaced and on what evidence. Replaced layers share the stock layers' tensors. Weights
mapped from a file stay so, and shared between processes, where the file puts them at cache lines' starts.

Rows do not depend on one another: with these layers, a token's result is the same bits whatever else is in its batch
(for models whose widths are multiples of 32: in a narrower rest, torch's own activation functions round otherwise than
in the vectors before it).
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType

import torch
from torch import nn
from torch.nn import functional

from starmesh.engine.native import NativeLibrary

_TOLERANCE = 1e-5
# Vectors that straddle cache lines cost 8 % of a step at batch 1 and 8, 13 % at batch 32 (SmolLM2-135M, AVX-512).
_CACHE_LINE_BYTES = 64
_MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

Rotation = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class NativeLinear(nn.Linear):
    """``nn.Linear`` for few rows: streams the weights once at memory bandwidth while all rows use them."""

    def __init__(self, stock: nn.Linear, library: NativeLibrary, threads: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = stock.in_features, stock.out_features
        self.weight, self.bias = stock.weight, stock.bias
        self._function = library.linear
        self._threads = threads
        # Parameters of a loaded model never move: what the call needs is read once.
        self._weight_address = stock.weight.data_ptr()
        self._bias_address = None if stock.bias is None else stock.bias.data_ptr()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not input.is_contiguous():
            input = input.contiguous()
        depth, columns = self.in_features, self.out_features
        output = input.new_empty((*input.shape[:-1], columns))
        self._function(
            input.data_ptr(),
            self._weight_address,
            self._bias_address,
            output.data_ptr(),
            input.numel() // depth,
            depth,
            columns,
            self._threads,
        )
        return output


class NativeRmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * gain over the last dimension."""

    def __init__(self, gain: torch.Tensor, epsilon: float, library: NativeLibrary) -> None:
        super().__init__()
        self.register_buffer("gain", gain, persistent=False)
        self._epsilon = epsilon
        self._function = library.rms_norm
        self._width = gain.numel()
        self._gain_address = gain.data_ptr()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not input.is_contiguous():
            input = input.contiguous()
        output = torch.empty_like(input)
        self._function(
            input.data_ptr(),
            self._gain_address,
            output.data_ptr(),
            input.numel() // self._width,
            self._width,
            self._epsilon,
        )
        return output


class NativeGatedMlp(nn.Module):
    """down(activation(gate(x)) * up(x)) without biases."""

    def __init__(
        self, gate: nn.Linear, up: nn.Linear, down: nn.Linear, *, activation: int, library: NativeLibrary, threads: int
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down
        self._inner, self._width = gate.out_features, gate.in_features
        self._addresses = [projection.weight.data_ptr() for projection in (gate, up, down)]
        self._activation = activation
        self._function = library.gated_mlp
        self._threads = threads

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        input = input.contiguous()
        rows = input.numel() // self._width
        scratch = input.new_empty(2 * rows * self._inner)
        output = torch.empty_like(input)
        self._function(
            input.data_ptr(),
            *self._addresses,
            scratch.data_ptr(),
            output.data_ptr(),
            rows,
            self._width,
            self._inner,
            self._activation,
            self._threads,
        )
        return output


class NativeRotation:
    """``apply_rotary_pos_emb`` of ``transformers``' model files: rotates queries and keys, here in place."""

    def __init__(self, stock: Rotation, library: NativeLibrary) -> None:
        self._stock = stock
        self._function = library.rotate
        self._multiple = 2 * library.lanes

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _, heads, tokens, head_dim = q.shape
        expected = (1, tokens, head_dim)
        if unsqueeze_dim != 1 or cos.shape != expected or sin.shape != expected or head_dim % self._multiple:
            return self._stock(q, k, cos, sin, unsqueeze_dim)
        if q.stride(3) != 1 or k.stride(3) != 1 or not (cos.is_contiguous() and sin.is_contiguous()):
            return self._stock(q, k, cos, sin, unsqueeze_dim)
        angles = (cos.data_ptr(), sin.data_ptr(), tokens)
        self._function(q.data_ptr(), q.stride(2), q.stride(1), *angles, heads, head_dim)
        self._function(k.data_ptr(), k.stride(2), k.stride(1), *angles, k.shape[1], head_dim)
        return q, k


def accelerate(model: nn.Module, library: NativeLibrary, *, threads: int) -> None:
    """Replace what the library can take of a float32 CPU model, in place: linear layers, gated MLPs, RMS norms and the
    rotation by positions. Whatever does not compute what the native version computes stays as it is, and so does every
    layer of another kind of model: native layers take addresses on trust.
    """
    if any(tensor.dtype != torch.float32 or tensor.device.type != "cpu" for tensor in model.parameters()):
        return
    for parameter in model.parameters():
        if parameter.data_ptr() % _CACHE_LINE_BYTES:
            parameter.data = parameter.data.clone()  # in place: tied layers stay tied
    for name, module in list(model.named_modules()):
        replacement: nn.Module | None = None
        if type(module) is nn.Linear:
            replacement = _linear(module, library, threads)
        elif type(module).__name__.endswith("RMSNorm"):
            replacement = _rms_norm(module, library)
        elif all(type(getattr(module, child, None)) is nn.Linear for child in _MLP_PROJECTIONS):
            replacement = _gated_mlp(module, library, threads)
        elif hasattr(module, "layer_idx") and "apply_rotary_pos_emb" in type(module).forward.__globals__:
            _rotate_natively(module, library)
        if replacement is not None:
            model.set_submodule(name, replacement.eval())


def _close(ours: torch.Tensor, stock: torch.Tensor) -> bool:
    return float((ours - stock).abs().max()) <= _TOLERANCE * float(stock.abs().max())


def _sample(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _linear(stock: nn.Linear, library: NativeLibrary, threads: int) -> nn.Module | None:
    return NativeLinear(stock, library, threads) if _fits(stock, library) else None


def _fits(stock: nn.Linear, library: NativeLibrary) -> bool:
    return (
        stock.weight.is_contiguous()
        and stock.in_features % library.lanes == 0
        and stock.out_features % library.columns == 0
    )


def _rms_norm(stock: nn.Module, library: NativeLibrary) -> nn.Module | None:
    """Families scale by the weight (Llama) or by 1 + weight (Gemma): the layer itself says which."""
    weight = getattr(stock, "weight", None)
    epsilon = getattr(stock, "variance_epsilon", getattr(stock, "eps", None))
    if not isinstance(weight, torch.Tensor) or epsilon is None:
        return None
    if weight.dim() != 1 or weight.numel() % library.lanes:
        return None
    sample = _sample(2, weight.numel())
    wanted = stock(sample)
    for gain in (weight.detach(), 1.0 + weight.detach()):
        if _close(functional.rms_norm(sample, (weight.numel(),), gain, float(epsilon)), wanted):
            return NativeRmsNorm(gain.contiguous(), float(epsilon), library)
    return None


def _gated_mlp(stock: nn.Module, library: NativeLibrary, threads: int) -> nn.Module | None:
    projections: list[nn.Linear] = [getattr(stock, name) for name in _MLP_PROJECTIONS]
    if any(not _fits(projection, library) or projection.bias is not None for projection in projections):
        return None
    gate, up, down = projections
    if not gate.weight.shape == up.weight.shape == down.weight.shape[::-1]:
        return None
    sample = _sample(1, gate.in_features)
    wanted = stock(sample)
    for activation in (0, 1):
        candidate = NativeGatedMlp(gate, up, down, activation=activation, library=library, threads=threads)
        if _close(candidate(sample), wanted):
            return candidate
    return None


def _rotate_natively(attention: nn.Module, library: NativeLibrary) -> None:
    """Let this one attention module call our rotation where its model file's function says ``apply_rotary_pos_emb``.

    The function is a global of the model file, shared with every other model of the process; so this module alone gets
    a copy of its ``forward`` that finds ours under that name.
    """
    forward = type(attention).forward
    stock: Rotation = forward.__globals__["apply_rotary_pos_emb"]
    head_dim = 2 * library.lanes
    queries, angles = _sample(1, 2, 3, head_dim), _sample(2, 1, 3, head_dim)
    try:
        wanted = stock(queries, queries, angles[0], angles[1])
    except (TypeError, RuntimeError):
        return  # another signature, or rotation of another kind
    ours = NativeRotation(stock, library)
    if not _close(ours(queries.clone(), queries.clone(), angles[0], angles[1])[0], wanted[0]):
        return
    names = {**forward.__globals__, "apply_rotary_pos_emb": ours}
    copy = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    attention.forward = MethodType(copy, attention)
