"""The launches of a layer on Hopper without a GPU: plain torch follows every address that they get, in their order."""

import ctypes
from typing import Any

import pytest
import torch

import moeyard
from moeyard import Activation, Routing, reference
from moeyard.cuda.experts import launchers, layer
from moeyard.cuda.experts.layer import LayerSizes, layer_launches
from moeyard.cuda.experts.plan import Way
from moeyard.cuda.runtime import launch
from moeyard.cuda.runtime.cards import Card
from moeyard.cuda.runtime.planning import planning
from moeyard.testing import draw_weights, guard_broken, poisoned
from moeyard.values import ExpertCall

H200 = Card(132, 232448, True)
KINDS = {"BFLOAT16": torch.bfloat16, "FLOAT16": torch.float16}


def at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The memory at an address."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=dtype).view(shape)


class Followed:
    """A launch that plain torch computes at the addresses it is given."""

    started: list[str] = []  # noqa: RUF012 - of all launches

    def __init__(self, recipe: Any) -> None:
        self.source, self.defines = recipe.source, dict(recipe.defines)

    def __call__(self, shape: Any, *pointers: int) -> None:
        self.started.append(self.source)
        {"align.cu": self.align, "send.cu": self.permute, "sum.cu": self.sum}[self.source](shape.sizes, *pointers)

    def align(self, sizes: tuple[int, ...], ids: int, mapping: int, *outputs: int) -> None:
        routes, num_experts, experts, block_size = sizes[:4]
        dtype = torch.int64 if self.defines["ID"] == "i64" else torch.int32
        given = at(mapping, (num_experts,), torch.int32).clone() if mapping else None
        layout = reference.moe_align_block_size(
            at(ids, (routes,), dtype).clone(), num_experts=num_experts, block_size=block_size, expert_map=given,
            num_local_experts=experts,
        )  # fmt: skip
        for address, tensor in zip(outputs, layout.tensors, strict=False):
            at(address, tuple(tensor.shape), tensor.dtype).copy_(tensor)

    def permute(self, sizes: tuple[int, ...], rows: int, route_rows: int, out: int, *_: int) -> None:
        tokens, top_k, words, stride = sizes[0], *sizes[4:7]
        row_bytes = words * int(self.defines["WORD"])
        assert row_bytes == stride
        source, places = at(rows, (tokens, stride), torch.uint8), at(route_rows, (tokens, top_k), torch.int32)
        for token, k in (places >= 0).nonzero().tolist():
            at(out + int(places[token, k]) * row_bytes, (row_bytes,), torch.uint8).copy_(source[token])

    def sum(self, sizes: tuple[int, ...], rows: int, route_rows: int, weights: int, _: int, out: int) -> None:
        tokens, top_k, words, _, stride = sizes[0], *sizes[4:8]
        dtype = KINDS[self.defines["ROW_KIND"]]
        columns = words * int(self.defines["WORD"]) // dtype.itemsize
        assert (self.defines["WEIGHTS"] == "true") == bool(weights) and stride == columns * dtype.itemsize
        places = at(route_rows, (tokens, top_k), torch.int32)
        factors = at(weights, (tokens, top_k), torch.float32) if weights else torch.ones(tokens, top_k)
        total = torch.zeros(tokens, columns)
        for token, k in (places >= 0).nonzero().tolist():
            total[token] += at(rows + int(places[token, k]) * stride, (columns,), dtype).float() * factors[token, k]
        at(out, (tokens, columns), dtype).copy_(total)

    def with_maps(
        self, shape: Any, maps: Any, rows: int, bias: int, factors: int, slots: int, firsts: int, counts: int,
        out: int, turns: int,
    ) -> None:  # fmt: skip
        self.started.append(self.source)
        experts, columns, size, pitch, divisor = shape.sizes[:5]
        on = {name: value == "true" for name, value in self.defines.items()}
        dtype, (weight_at, *weight_shape) = KINDS[self.defines["ROW_KIND"]], maps[0]
        weight, halves = at(weight_at, tuple(weight_shape), dtype).float(), 1 + on["GATED"]
        assert weight.shape == (experts, halves * columns, size) and pitch == size * dtype.itemsize
        assert on["BIASED"] == bool(bias) and on["WEIGHTED"] == bool(factors)
        assert on["GATHER"] or maps[1][0] == rows, "the map is of the rows"
        starts, numbers = at(firsts, (experts,), torch.int64).tolist(), at(counts, (experts,), torch.int32).tolist()
        for expert, (start, number) in enumerate(zip(starts, numbers, strict=True)):
            for row in range(start, start + number):
                route = int(at(slots + 4 * row, (1,), torch.int32)) if slots else row
                source = rows + (route // divisor if on["GATHER"] else row) * pitch
                result = weight[expert] @ at(source, (size,), dtype).float()
                if bias:
                    result += at(bias + expert * halves * columns * dtype.itemsize, (len(result),), dtype).float()
                if on["GATED"]:
                    result = torch.nn.functional.silu(result[:columns]) * result[columns:]
                elif self.defines["ACTIVATION"] == "RELU2":
                    result = result.relu().square()
                if factors:
                    result = result * at(factors + 4 * route, (1,), torch.float32)
                at(out + row * columns * dtype.itemsize, (columns,), dtype).copy_(result)


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(launch, "Noted", Followed)
    monkeypatch.setattr(layer, "weight_maps", lambda *kind: lambda address: (address, *kind[:3]))
    monkeypatch.setattr(layer, "row_maps", lambda *_: lambda address: (address,))
    monkeypatch.setattr(Followed, "started", [])
    return Followed.started


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("copied", [False, True], ids=["gathered", "copied"])
@pytest.mark.parametrize("kind", ["plain", "full", "not gated", "one token", "many experts"])
def test_a_layer_computes_experts(kind: str, copied: bool, dtype: torch.dtype, followed: list[str]) -> None:
    """Plain; with biases, a map, wide ids and a result beside the tokens; a table that the result has no room for."""
    tokens, top_k, experts, hidden, size = {"one token": (1, 4, 9, 48, 32), "many experts": (3, 2, 90, 16, 16)}.get(
        kind, (21, 3, 5, 64, 48)
    )
    full, gated = kind == "full", kind != "not gated"
    weights = draw_weights(experts, hidden, size, dtype, gated=gated, bias=full)
    activation = Activation() if gated else Activation("relu2")
    num_experts, mapping = experts, None
    if full:
        num_experts, every = 2 * experts, torch.arange(2 * experts)
        mapping = torch.where(every % 2 == 0, every // 2, -1).int()
    ids = torch.randint(-1, num_experts, (tokens, top_k), dtype=torch.int64 if full else torch.int32)
    factors, both = torch.rand(tokens, top_k), torch.randn(2 * tokens, hidden).to(dtype)
    rows, out = both[:tokens], both[tokens:] if full else poisoned((tokens, hidden), dtype)
    with planning(H200):
        launchers.fused_experts_launch(
            rows, factors, ids, ExpertCall(weights, activation, num_experts, mapping), out=out, way=Way(copied)
        )
    assert followed == ["align.cu", *["send.cu"] * copied, "experts.cu", "experts.cu", "sum.cu"]
    assert full or not guard_broken(out)
    options: dict[str, Any] = {"activation": activation, "num_experts": num_experts, "expert_map": mapping}
    wanted = moeyard.fused_experts(rows, Routing(factors, ids), weights, impl="torch", **options)
    assert torch.allclose(out.float(), wanted.float(), atol=2e-2, rtol=2e-2), (out.float() - wanted.float()).abs().max()


def test_rows_in_the_wrong_place_are_found(followed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of both products in one place."""
    weights, rows, out = draw_weights(5, 64, 48, torch.bfloat16), torch.randn(21, 64).bfloat16(), torch.zeros(21, 64)
    ids, factors, out = torch.randint(0, 5, (21, 3), dtype=torch.int32), torch.rand(21, 3), out.bfloat16()
    monkeypatch.setattr(launchers, "layer_launches", lambda sizes: layer_launches(sizes)._replace(rows=0))
    with planning(H200):
        launchers.fused_experts_launch(rows, factors, ids, ExpertCall(weights, Activation(), 5), out=out, way=Way(True))
    wanted = moeyard.fused_experts(rows, Routing(factors, ids), weights, impl="torch")
    assert len(followed) == 5 and not torch.allclose(out.float(), wanted.float(), atol=2e-2, rtol=2e-2)


def test_a_layer_takes_no_more_memory_than_its_rows_and_tables() -> None:
    """Of one allocation: what both products leave, slots where they cannot lie in it, places of routes, a table."""
    with planning(H200):
        for tokens in (1, 7, 64, 5000, 16384):
            for dtype in (torch.bfloat16, torch.float16):
                for copied in (False, True):
                    made = layer_launches(LayerSizes(
                        tokens, 8, 128, 1536, 2048, 768, dtype, torch.int32, Activation(), True, (False, False), 128,
                        False, True, 0, True, Way(copied), -1,
                    ))  # fmt: skip
                    routes = 8 * tokens
                    needed = 2 * routes * (768 + 2048) + 4 * routes * (1 + (dtype == torch.float16))
                    assert needed <= made.num_bytes <= needed + 6 * 256
                    assert len(made.chain.steps) == 4 + copied and made.table is None
