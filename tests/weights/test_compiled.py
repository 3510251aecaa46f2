"""A packed linear inside `torch.compile` is one operator: its kernel is called, never traced."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_ctxopt.weights import matmul
from hf_ctxopt.weights.codecs import decode, encode
from hf_ctxopt.weights.linear import GgufLinear


class Block(nn.Module):
    """What a decoder layer does around a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = GgufLinear(64, 48, False, "Q8_0")
        self.proj.weight.data = encode(torch.randn(48, 64), "Q8_0")

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.silu(self.proj(x * 2)) + 1


class Kernel:
    """Stands in for a Triton launch: what it does cannot be traced."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x: Tensor, packed: Tensor, type: str) -> Tensor:
        assert not torch.compiler.is_compiling()
        assert type == "Q8_0"
        self.rows.append(len(x))
        return torch.from_numpy(x.detach().numpy() @ decode(packed, type).numpy().T)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    found = Kernel()
    monkeypatch.setattr(matmul, "gguf_kernel", lambda device: found)
    torch._dynamo.reset()
    return found


@torch.no_grad()
def test_kernel_is_called_and_not_traced(kernel: Kernel) -> None:
    block, x = Block(), torch.randn(1, 3, 64)
    want = torch.nn.functional.silu((x * 2) @ block.proj.dequantize().T) + 1
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(block, backend=backend, fullgraph=True)  # a graph break would raise
    for _ in range(3):
        torch.testing.assert_close(compiled(x), want)
    assert kernel.rows == [3, 3, 3]  # once a step, never with made-up tensors
    (graph,) = graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("hf_ctxopt.gguf_matmul" in name for name in called) == 1
    before = block.proj.weight.clone()
    other = torch.randn_like(x)
    torch.testing.assert_close(compiled(other), block(other))
    assert torch.equal(block.proj.weight, before)


def test_operator_is_registered_rightly(kernel: Kernel) -> None:
    packed = encode(torch.randn(48, 64), "Q8_0")
    for x in (torch.randn(2, 64), torch.randn(2, 64, requires_grad=True)):
        torch.library.opcheck(matmul.opaque_matmul, (x, packed, "Q8_0"))


def test_gradient_of_a_compiled_step(kernel: Kernel) -> None:
    block, x = Block(), torch.randn(2, 64, requires_grad=True)
    block(x).sum().backward()
    want, x.grad = x.grad, None
    torch.compile(block, backend="aot_eager", fullgraph=True)(x).sum().backward()
    torch.testing.assert_close(x.grad, want)
