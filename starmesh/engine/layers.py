"""Drop-in layers by ``native.cpp`` for float32 models on a CPU: same parameters, same results to rounding.

Owns which stock layers are replaced and on what evidence. Replaced layers share the stock layers' tensors: nothing is
copied, so weights mapped from a file stay shared between processes. Their rows do not depend on one another: with
them, a token's result is the same bits whatever else is in its batch (for models whose widths are multiples of 32:
in a narrower rest, torch's own activation functions round otherwise than in the vectors before it).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from starmesh.engine.native import NativeLibrary

_NORM_TOLERANCE = 1e-5


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


def accelerate(model: nn.Module, library: NativeLibrary, *, threads: int) -> None:
    """Replace the linear and RMS norm layers of a float32 CPU model that the library can take, in place."""
    for name, module in list(model.named_modules()):
        replacement: nn.Module | None = None
        if type(module) is nn.Linear:
            replacement = _linear(module, library, threads)
        elif type(module).__name__.endswith("RMSNorm"):
            replacement = _rms_norm(module, library)
        if replacement is not None:
            model.set_submodule(name, replacement.eval())


def _linear(stock: nn.Linear, library: NativeLibrary, threads: int) -> nn.Module | None:
    fits = (
        stock.weight.dtype == torch.float32
        and stock.weight.is_contiguous()
        and stock.in_features % library.lanes == 0
        and stock.out_features % library.columns == 0
    )
    return NativeLinear(stock, library, threads) if fits else None


def _rms_norm(stock: nn.Module, library: NativeLibrary) -> nn.Module | None:
    """A norm that gives what ``stock`` gives on random input, or None.

    Families scale by the weight (Llama) or by 1 + weight (Gemma): the layer itself says which.
    """
    weight = getattr(stock, "weight", None)
    epsilon = getattr(stock, "variance_epsilon", getattr(stock, "eps", None))
    if not isinstance(weight, torch.Tensor) or weight.dtype != torch.float32 or epsilon is None:
        return None
    if weight.dim() != 1 or weight.numel() % library.lanes:
        return None
    sample = torch.randn(2, weight.numel(), generator=torch.Generator().manual_seed(0))
    wanted = stock(sample)
    for gain in (weight.detach(), 1.0 + weight.detach()):
        candidate = functional.rms_norm(sample, (weight.numel(),), gain, float(epsilon))
        if torch.allclose(candidate, wanted, rtol=_NORM_TOLERANCE, atol=_NORM_TOLERANCE):
            return NativeRmsNorm(gain.contiguous(), float(epsilon), library)
    return None
