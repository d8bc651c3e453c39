"""Native layers against the stock ones, row by row."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from starmesh.engine import native
from starmesh.engine.layers import NativeGatedMlp, NativeLinear, NativeRmsNorm, accelerate


@pytest.fixture(scope="module")
def library() -> native.NativeLibrary:
    found = native.library()
    if found is None:
        pytest.skip("no C++ compiler here")
    return found


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("depth", "columns"), [(64, 4), (576, 192), (1536, 100), (3200, 36)])
@pytest.mark.parametrize("threads", [1, 2])
def test_linear(library: native.NativeLibrary, depth: int, columns: int, bias: bool, threads: int) -> None:
    stock = nn.Linear(depth, columns, bias=bias).requires_grad_(False)
    ours = NativeLinear(stock, library, threads)
    x = draw(1, 27, depth)
    whole = ours(x)
    torch.testing.assert_close(whole, functional.linear(x, stock.weight, stock.bias), rtol=1e-4, atol=1e-4)
    for rows in (*range(1, 14), 24, 27):
        assert torch.equal(ours(x[:, :rows]), whole[:, :rows])
    assert ours(x[:, :0]).shape == (1, 0, columns)
    assert torch.equal(ours(x.expand(2, -1, -1).transpose(0, 1)), whole.expand(2, -1, -1).transpose(0, 1))


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm])
def test_accelerate_finds_out_how_a_norm_scales(library: native.NativeLibrary, kind: type[nn.Module]) -> None:
    model = nn.ModuleDict({"norm": kind(64)}).requires_grad_(False)
    model["norm"].get_parameter("weight").copy_(draw(64))
    x = 5 * draw(3, 7, 64)
    wanted: torch.Tensor = model["norm"](x)
    accelerate(model, library, threads=1)
    assert isinstance(model["norm"], NativeRmsNorm)
    torch.testing.assert_close(model["norm"](x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("activation", "fused"), [("silu", True), ("gelu_pytorch_tanh", True), ("relu", False)])
def test_accelerate_fuses_only_mlps_that_it_computes(
    library: native.NativeLibrary, activation: str, fused: bool
) -> None:
    config = LlamaConfig(hidden_size=64, intermediate_size=160, hidden_act=activation)
    model = nn.ModuleDict({"mlp": LlamaMLP(config)}).requires_grad_(False)
    x = 3 * draw(1, 9, 64)
    wanted = model["mlp"](x)
    accelerate(model, library, threads=1)
    assert isinstance(model["mlp"], NativeGatedMlp) == fused
    torch.testing.assert_close(model["mlp"](x), wanted, rtol=1e-5, atol=1e-5)


def test_other_dtypes_are_left_alone(library: native.NativeLibrary) -> None:
    model = nn.ModuleDict({"linear": nn.Linear(64, 64), "norm": LlamaRMSNorm(64)}).to(torch.bfloat16)
    accelerate(model, library, threads=1)
    assert type(model["linear"]) is nn.Linear
    assert type(model["norm"]) is LlamaRMSNorm


def test_tied_weights_stay_tied_when_they_are_moved(library: native.NativeLibrary) -> None:
    embedding, head = nn.Embedding(32, 64), nn.Linear(64, 32, bias=False)
    storage = torch.randn(32 * 64 + 2)
    embedding.weight.data = storage[2:].view(32, 64)  # as in a file: not at a cache line's start
    head.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": head}).requires_grad_(False)
    accelerate(model, library, threads=1)
    assert model["head"].weight is embedding.weight
    assert embedding.weight.data_ptr() % 64 == 0
    assert torch.equal(embedding.weight, storage[2:].view(32, 64))
