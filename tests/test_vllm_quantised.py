"""vLLM's quantised names: what its arguments mean, against the specification on the CPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import moeyard
from moeyard.integrations import vllm
from moeyard.quant import FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR, ExpertScales, QuantScheme
from moeyard.testing import draw_routing, same_bits

E4M3, INT8 = torch.float8_e4m3fn, torch.int8
EXPERTS, HIDDEN, SIZE, TOKENS, TOP_K = 4, 144, 128, 7, 2


def quantised(wide: Tensor, kind: str, code: torch.dtype = E4M3) -> tuple[Tensor, Tensor]:
    """Codes of a weight [E, R, C] and float32 scales in one of vLLM's shapes: "tensor", "channel" or "block"."""
    largest = 448.0 if code == E4M3 else 127.0
    experts, rows, columns = wide.shape
    if kind == "block":
        padded = torch.nn.functional.pad(wide, (0, -columns % 128, 0, -rows % 128))
        blocks = padded.view(experts, -(-rows // 128), 128, -(-columns // 128), 128)
        scale = blocks.abs().amax((2, 4)) / largest
        each = scale.repeat_interleave(128, 1)[:, :rows].repeat_interleave(128, 2)[:, :, :columns]
    else:
        scale = wide.abs().amax((1, 2) if kind == "tensor" else 2, keepdim=True) / largest
        each = scale
    codes = wide / each
    return (codes if code == E4M3 else codes.round()).to(code), scale


def draw(kind: str = "tensor", code: torch.dtype = E4M3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w1, w1_scale, w2, w2_scale; gate and up, and experts, of different magnitudes."""
    w1 = torch.randn(EXPERTS, 2 * SIZE, HIDDEN) / HIDDEN**0.5 * torch.tensor([1.0, 4.0, 0.5, 2.0]).view(-1, 1, 1)
    w1[:, SIZE:] *= 3
    w2 = torch.randn(EXPERTS, HIDDEN, SIZE) / SIZE**0.5
    return *quantised(w1, kind, code), *quantised(w2, kind, code)


def route() -> moeyard.Routing:
    return draw_routing(TOKENS, EXPERTS, TOP_K)


def meant(w1: Tensor, s1: Tensor, w2: Tensor, s2: Tensor, scheme: QuantScheme, **inputs: Tensor) -> Any:
    """The same weights written down as moeyard's: scales in their shapes by hand."""
    if scheme.block == (0, 0):
        s1, s2 = s1.reshape(EXPERTS, 1, 1).repeat(1, 2, 1), s2.reshape(EXPERTS, 1, 1)
    return moeyard.ExpertWeights(w1, w2, scheme=scheme, scales=ExpertScales(s1, s2, **inputs))


def near(got: Tensor, wanted: Tensor) -> None:
    """Equal but for float32 sums and one rounding, which may move a code of the second product's rows."""
    scale = wanted.double().square().mean().sqrt()
    off = (got.double() - wanted.double()).square().mean().sqrt()
    assert torch.isfinite(got).all() and off <= 0.006 * scale, f"{off:.2e} beside {scale:.2e}"


CONFIGS: dict[str, tuple[str, torch.dtype, dict[str, Any], QuantScheme]] = {
    "fp8 tensor, per token": ("tensor", E4M3, {"per_act_token_quant": True}, FP8_TENSOR),
    "fp8 tensor, dynamic": ("tensor", E4M3, {}, FP8_TENSOR),
    "fp8 channel, per token": ("channel", E4M3, {"per_act_token_quant": True, "per_out_ch_quant": True}, FP8_CHANNEL),
    "fp8 channel, dynamic": ("channel", E4M3, {}, FP8_CHANNEL),
    "fp8 blocks": ("block", E4M3, {"block_shape": [128, 128]}, FP8_BLOCK),
    "fp8 weights, channel": ("channel", E4M3, {"quant_dtype": None}, QuantScheme("e4m3", (1, 0))),
    "fp8 weights, tensor": ("tensor", E4M3, {"quant_dtype": None}, QuantScheme("e4m3")),
    "fp8 weights, blocks": (
        "block", E4M3, {"quant_dtype": None, "block_shape": [128, 128]}, QuantScheme("e4m3", (128, 128)),
    ),
    "int8 channel, per token": (
        "channel", INT8, {"per_act_token_quant": True}, QuantScheme("int8", (1, 0), activations="int8"),
    ),
    "int8 tensor, dynamic": ("tensor", INT8, {}, QuantScheme("int8", activations="int8")),
    "int8 blocks": (
        "block", INT8, {"block_shape": [128, 128]},
        QuantScheme("int8", (128, 128), activations="int8", activation_group=128),
    ),
    "int8 weights": ("channel", INT8, {"quant_dtype": None}, QuantScheme("int8", (1, 0))),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("on_input", [False, True])
def test_fused_experts_means_what_its_config_says(name: str, on_input: bool) -> None:
    kind, code, said, scheme = CONFIGS[name]
    tensors, routing, hidden = draw(kind, code), route(), torch.randn(TOKENS, HIDDEN).bfloat16()
    config = vllm.FusedMoEQuantConfig(**{"quant_dtype": code, **said, "w1_scale": tensors[1], "w2_scale": tensors[3]})
    got = vllm.fused_experts(
        hidden, tensors[0], tensors[2], *(routing.topk_weights, routing.topk_ids), "silu", on_input, quant_config=config
    )
    weights, options = meant(*tensors, scheme), {"apply_router_weight_on_input": on_input}
    near(got, moeyard.fused_experts(hidden, routing, weights, impl="reference", **options))
    assert same_bits(got, moeyard.fused_experts(hidden, routing, weights, **options))


@pytest.mark.parametrize("code", [E4M3, INT8])
@pytest.mark.parametrize("kind", ["tensor", "channel"])
def test_given_scales_of_rows(code: torch.dtype, kind: str) -> None:
    tensors, routing, hidden = draw(kind, code), route(), torch.randn(TOKENS, HIDDEN).bfloat16()
    a1, a2 = torch.tensor(0.02), torch.tensor([0.5])
    make = vllm.fp8_w8a8_moe_quant_config if code == E4M3 else vllm.int8_w8a8_moe_quant_config
    name = "e4m3" if code == E4M3 else "int8"
    scheme = QuantScheme(name, (1, 0) if kind == "channel" else (0, 0), activations=name, static=True)
    inputs = {"w13_input": a1.repeat(EXPERTS), "w2_input": a2.repeat(EXPERTS)}
    arguments = (hidden, tensors[0], tensors[2], routing.topk_weights, routing.topk_ids)
    got = vllm.fused_experts(*arguments, quant_config=make(tensors[1], tensors[3], a1, a2))
    near(got, moeyard.fused_experts(hidden, routing, meant(*tensors, scheme, **inputs), impl="reference"))
    first = vllm.fused_experts(*arguments, quant_config=make(tensors[1], tensors[3], a1, None))
    assert not same_bits(first, got)  # the second product's rows have scales of their own
    inputs.pop("w2_input")
    weights = meant(*tensors, replace(scheme, dynamic_second=True), **inputs)
    near(first, moeyard.fused_experts(hidden, routing, weights, impl="reference"))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_scales_come_in_several_shapes(shape: tuple[int, ...]) -> None:
    (w1, s1, w2, s2), routing, hidden = draw("channel"), route(), torch.randn(TOKENS, HIDDEN).half()
    arguments = (hidden, w1, w2, routing.topk_weights, routing.topk_ids)
    a1 = torch.full(shape, 0.03)
    wanted = vllm.fused_experts(*arguments, quant_config=vllm.fp8_w8a8_moe_quant_config(s1, s2, a1, a1))
    flat = vllm.fp8_w8a8_moe_quant_config(s1.squeeze(2), s2.squeeze(2), a1.reshape(1), a1.reshape(1))
    assert same_bits(vllm.fused_experts(*arguments, quant_config=flat), wanted)
    w1, s1, w2, s2 = draw("tensor")
    per_matrix = [
        vllm.fused_experts(
            hidden, w1, w2, *arguments[3:],
            quant_config=vllm.fp8_w8a8_moe_quant_config(s1.reshape(-1, *more), s2.reshape(-1, *more)),
        )
        for more in ((), (1,), (1, 1))
    ]  # fmt: skip
    assert same_bits(per_matrix[0], per_matrix[1]) and same_bits(per_matrix[0], per_matrix[2])


class Described:
    """Of vLLM's class, what weights alone have: its `block_shape` is that of rows."""

    quant_dtype = block_shape = a1_scale = a2_scale = w1_bias = w2_bias = None
    per_act_token_quant = per_out_ch_quant = False

    def __init__(self, w1_scale: Tensor, w2_scale: Tensor, shape: Any) -> None:
        self.w1_scale, self.w2_scale = w1_scale, w2_scale
        self._w1 = type("Description", (), {"shape": shape})()


def test_blocks_of_weights_alone_are_found_in_vllms_class() -> None:
    (w1, s1, w2, s2), routing, hidden = draw("block"), route(), torch.randn(TOKENS, HIDDEN).bfloat16()
    arguments = (hidden, w1, w2, routing.topk_weights, routing.topk_ids)
    got = vllm.fused_experts(*arguments, quant_config=Described(s1, s2, (128, 128)))
    ours = vllm.fp8_w8a16_moe_quant_config(s1, s2, block_shape=[128, 128])
    assert same_bits(got, vllm.fused_experts(*arguments, quant_config=ours))
    w1, s1, w2, s2 = draw("channel")
    arguments = (hidden, w1, w2, *arguments[3:])
    for shape in (None, (1, -1)):
        got = vllm.fused_experts(*arguments, quant_config=Described(s1, s2, shape))
        assert same_bits(got, vllm.fused_experts(*arguments, quant_config=vllm.fp8_w8a16_moe_quant_config(s1, s2)))


def test_activations_biases_and_maps_go_along() -> None:
    (w1, s1, w2, s2), hidden = draw("channel"), torch.randn(TOKENS, HIDDEN).bfloat16()
    biases = torch.randn(EXPERTS, 2 * SIZE).bfloat16(), torch.randn(EXPERTS, HIDDEN).bfloat16()
    mapping = torch.tensor([-1, 0, 1, -1, 2, 3, -1, 9], dtype=torch.int32)
    routing = moeyard.Routing(torch.rand(TOKENS, 3), torch.randint(-1, 9, (TOKENS, 3)))
    config = vllm.fp8_w8a8_moe_quant_config(s1, s2, w1_bias=biases[0], w2_bias=biases[1], per_act_token_quant=True)
    weights = replace(meant(w1, s1, w2, s2, FP8_CHANNEL), w13_bias=biases[0], w2_bias=biases[1])
    got = vllm.fused_experts(
        hidden, w1, w2, routing.topk_weights, routing.topk_ids, "swigluoai_uninterleave", False, 8, mapping, config
    )
    options = {"activation": moeyard.GPT_OSS_ACTIVATION, "num_experts": 8, "expert_map": mapping}
    near(got, moeyard.fused_experts(hidden, routing, weights, impl="reference", **options))
    plain = moeyard.ExpertWeights(
        w1[:, :SIZE], w2, gated=False, scheme=FP8_CHANNEL, scales=ExpertScales(s1[:, :SIZE], s2)
    )
    got = vllm.fused_experts(
        hidden, w1[:, :SIZE], w2, routing.topk_weights, routing.topk_ids, "relu2_no_mul", False, 8, mapping,
        vllm.fp8_w8a8_moe_quant_config(s1[:, :SIZE], s2, per_act_token_quant=True),
    )  # fmt: skip
    options["activation"] = moeyard.Activation("relu2")
    near(got, moeyard.fused_experts(hidden, routing, plain, impl="reference", **options))


@pytest.mark.parametrize("on_input", [False, True])
def test_the_routers_weight_counts_once(on_input: bool) -> None:
    """Weights of 2 double results, which are not quadrupled; a power of two changes no rounding here."""
    (w1, s1, w2, s2), hidden = draw("channel"), torch.randn(TOKENS, HIDDEN).bfloat16()
    ids = torch.randint(0, EXPERTS, (TOKENS, 1), dtype=torch.int32)
    config = vllm.fp8_w8a8_moe_quant_config(s1, s2, per_act_token_quant=True, per_out_ch_quant=True)

    def cutlass(rows: Tensor, factor: float, by_input: bool) -> Tensor:
        factors = torch.full((TOKENS, 1), factor)
        return vllm.cutlass_moe_fp8(
            rows, w1, w2, factors, ids, None, None, None, None, config, apply_router_weight_on_input=by_input
        )

    once = cutlass(2 * hidden, 1.0, False) if on_input else 2 * cutlass(hidden, 1.0, False)
    assert same_bits(cutlass(hidden, 2.0, on_input), once)
    assert not same_bits(cutlass(2 * hidden, 2.0, False), once)  # as it would be if both were multiplied


def per_token(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales [..., 1] of rows, a scale per row."""
    scale = rows.float().abs().amax(-1, keepdim=True).clamp(min=1e-10) / torch.tensor(448.0)
    return (rows.float() / scale).clamp(-448, 448).to(E4M3), scale


def run_cutlass(
    codes: Tensor, scale: Tensor, weights: tuple[Tensor, ...], routing: moeyard.Routing, **changed: Any
) -> Tensor:
    """`run_cutlass_moe_fp8` in the standard format, by vLLM's names."""
    w1, s1, w2, s2 = weights
    output = torch.full(codes.shape, torch.nan, dtype=changed.get("out_dtype", torch.bfloat16))
    arguments = {
        "output": output, "hidden_states": codes, "w1": w1, "w2": w2, "topk_ids": routing.topk_ids,
        "activation": "silu", "global_num_experts": EXPERTS, "expert_map": None, "w1_scale": s1, "w2_scale": s2,
        "a1q_scale": scale, "a2_scale": None, "ab_strides1": None, "ab_strides2": None, "c_strides1": None,
        "c_strides2": None, "workspace13": torch.full((5,), torch.nan), "workspace2": None,
        "expert_num_tokens": None, "out_dtype": torch.bfloat16, "per_act_token": True,
        "per_out_ch": s1.numel() > EXPERTS, "use_batched_format": False, "topk_weights": routing.topk_weights,
    }  # fmt: skip
    vllm.run_cutlass_moe_fp8(**{**arguments, **changed})
    return output


@pytest.mark.parametrize("kind", ["tensor", "channel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_that_are_codes_already_are_not_rounded_again(kind: str, dtype: torch.dtype) -> None:
    weights, routing = draw(kind), route()
    hidden = (torch.randn(TOKENS, HIDDEN) * torch.logspace(-4, 1, TOKENS).unsqueeze(1)).to(dtype)
    hidden[3] = 0
    scheme = FP8_TENSOR if kind == "tensor" else FP8_CHANNEL
    wanted = moeyard.fused_experts(hidden, routing, meant(*weights, scheme))
    codes, scale = per_token(hidden)
    assert same_bits(run_cutlass(codes, scale, weights, routing, out_dtype=dtype), wanted)


@pytest.mark.parametrize("second", [None, 0.5])
def test_codes_under_one_scale_are_multiplied_as_they_are(second: float | None) -> None:
    """Rows far below the scale's range have few codes left, which another rounding would move."""
    weights, routing = draw("channel"), route()
    hidden = torch.randn(TOKENS, HIDDEN) * torch.logspace(-3, 0, TOKENS).unsqueeze(1)
    a1, a2 = torch.tensor([2e-5 if second is None else 0.01]), None if second is None else torch.tensor([second])
    codes = (hidden / a1).clamp(-448, 448).to(E4M3)
    got = run_cutlass(codes, a1, weights, routing, per_act_token=False, a2_scale=a2, out_dtype=torch.float32)
    values = codes.float() * a1
    scheme = QuantScheme("e4m3", (1, 0), activations="e4m3", static=True, dynamic_second=second is None)
    inputs = {"w13_input": a1.repeat(EXPERTS)} | ({} if a2 is None else {"w2_input": a2.repeat(EXPERTS)})
    wanted = moeyard.fused_experts(values, routing, meant(*weights, scheme, **inputs), impl="reference")
    near(got, wanted)


def test_the_standard_format_under_a_map_reads_no_workspace() -> None:
    weights, hidden = draw("channel"), torch.randn(TOKENS, HIDDEN).bfloat16()
    routing = moeyard.Routing(torch.rand(TOKENS, 3), torch.randint(-1, 9, (TOKENS, 3), dtype=torch.int32))
    mapping = torch.tensor([-1, 0, 1, -1, 2, 3, -1, 9], dtype=torch.int32)
    got = run_cutlass(*per_token(hidden), weights, routing, expert_map=mapping, global_num_experts=8)
    options = {"num_experts": 8, "expert_map": mapping, "impl": "reference"}
    near(got, moeyard.fused_experts(hidden, routing, meant(*weights, FP8_CHANNEL), **options))


BATCH = 5
COUNTS = torch.tensor([2, 0, 7, 5], dtype=torch.int32)


def one_by_one(hidden: Tensor, weights: moeyard.ExpertWeights) -> Tensor:
    """The batched result, row by row from the specification."""
    result = torch.zeros(hidden.shape, dtype=hidden.dtype)
    for expert, count in enumerate(COUNTS.clamp(0, BATCH).tolist()):
        if count:
            ones = moeyard.Routing(torch.ones(count, 1), torch.full((count, 1), expert, dtype=torch.int32))
            result[expert, :count] = moeyard.fused_experts(hidden[expert, :count], ones, weights, impl="reference")
    return result


def poisoned(rows: Tensor) -> Tensor:
    """Rows that do not count hold NaN, which any amax would spread."""
    counts = torch.arange(BATCH) < COUNTS.unsqueeze(1)
    return torch.where(counts.unsqueeze(2), rows.float(), torch.nan).to(rows.dtype)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_batched_format(name: str) -> None:
    kind, code, said, scheme = CONFIGS[name]
    w1, s1, w2, s2 = draw(kind, code)
    hidden = torch.randn(EXPERTS, BATCH, HIDDEN).bfloat16()
    config = vllm.FusedMoEQuantConfig(**{"quant_dtype": code, **said, "w1_scale": s1, "w2_scale": s2})
    got = vllm.batched_experts(poisoned(hidden), w1, w2, COUNTS, "silu", config)
    near(got, one_by_one(hidden, meant(w1, s1, w2, s2, scheme)))
    assert bool((got[torch.arange(BATCH) >= COUNTS.unsqueeze(1)] == 0).all())


def test_the_batched_format_of_plain_weights() -> None:
    w1, w2 = torch.randn(EXPERTS, 2 * SIZE, HIDDEN).bfloat16() / 16, torch.randn(EXPERTS, HIDDEN, SIZE).bfloat16() / 16
    hidden = torch.randn(EXPERTS, BATCH, HIDDEN).bfloat16()
    got = vllm.batched_experts(poisoned(hidden), w1, w2, COUNTS)
    near(got, one_by_one(hidden, moeyard.ExpertWeights(w1, w2)))
    assert vllm.batched_experts(hidden[:, :0], w1, w2, COUNTS).shape == (EXPERTS, 0, HIDDEN)


@pytest.mark.parametrize("how", ["token", "tensor", "expert", "block"])
def test_batched_rows_that_are_codes_already(how: str) -> None:
    w1, s1, w2, s2 = draw("block" if how == "block" else "channel")
    hidden = torch.randn(EXPERTS, BATCH, HIDDEN).bfloat16()
    said: dict[str, Any] = {"block_shape": [128, 128]} if how == "block" else {"per_act_token_quant": how == "token"}
    config = vllm.fp8_w8a8_moe_quant_config(s1, s2, **said)
    if how in ("token", "block"):
        groups = [hidden] if how == "token" else hidden.split(128, 2)
        parts = [per_token(group) for group in groups]
        codes, scale = torch.cat([p[0].float() for p in parts], 2).to(E4M3), torch.cat([p[1] for p in parts], 2)
        scheme = FP8_CHANNEL if how == "token" else FP8_BLOCK
        weights, values = meant(w1, s1, w2, s2, scheme), hidden
    else:
        scale = torch.tensor([0.02]) if how == "tensor" else torch.rand(EXPERTS, 1, 1) / 20 + 0.01
        codes = (hidden.float() / scale).clamp(-448, 448).to(E4M3)
        scheme = QuantScheme("e4m3", (1, 0), activations="e4m3", static=True, dynamic_second=True)
        weights = meant(w1, s1, w2, s2, scheme, w13_input=scale.reshape(-1).expand(EXPERTS))
        values = (codes.float() * scale).to(hidden.dtype)
    got = vllm.batched_experts(poisoned(codes), w1, w2, COUNTS, "silu", config, scale)
    near(got, one_by_one(values, weights))
    if how == "block":
        return
    output = torch.full(hidden.shape, torch.nan, dtype=torch.bfloat16)
    ours = run_cutlass(
        poisoned(codes), scale, (w1, s1, w2, s2), route(), per_act_token=how == "token", use_batched_format=True,
        expert_num_tokens=COUNTS, topk_weights=None, output=output,
    )  # fmt: skip
    assert same_bits(output, got) and bool(ours.isnan().all())


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("given", [False, True])
def test_scales_are_permuted_with_their_rows(mapped: bool, groups: int, given: bool) -> None:
    rows = torch.randn(TOKENS, HIDDEN).to(E4M3)
    scale = torch.rand(TOKENS, groups)
    ids = draw_routing(TOKENS, 8, 3, "uniform").topk_ids
    mapping = torch.tensor([-1, 0, 1, -1, 2, 3, -1, -1], dtype=torch.int32) if mapped else None
    out = torch.empty(TOKENS * 3, HIDDEN, dtype=E4M3) if given else None
    got, moved, offsets, inverse, index = vllm.moe_permute(rows, scale, ids, 8, 4 if mapped else -1, mapping, out)
    assert moved is not None and moved.shape == (TOKENS * 3, groups) and (out is None or got is out)
    used = int(offsets[-1])
    assert same_bits(moved[:used], scale[index[:used] // 3]) and bool(moved.isfinite().all())
    assert same_bits(got[:used].view(torch.uint8), rows.view(torch.uint8)[index[:used] // 3])
    # back again: the sum over a token's routes, where rows of other ranks hold NaN and do not count
    wide = got.float() * moved[:, :1]
    wide[used:] = torch.nan
    weights, result = torch.rand(TOKENS, 3), torch.empty(TOKENS, HIDDEN)
    vllm.moe_unpermute(result, wide, weights, inverse, offsets)
    here = torch.ones(ids.shape) if mapping is None else (mapping[ids.long()] >= 0).float()
    wanted = rows.float() * scale[:, :1] * (weights * here).sum(1, keepdim=True)
    assert torch.allclose(result, wanted, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (TOKENS,)])
def test_other_scales_pass_through_a_permutation(shape: tuple[int, ...]) -> None:
    scale, ids = torch.rand(shape), torch.zeros(TOKENS, 2, dtype=torch.int32)
    rows = torch.randn(TOKENS, 16)
    assert vllm.moe_permute(rows, scale, ids, 4)[1] is scale
    moved = vllm.moe_permute(rows[:1], torch.ones(1, 1), ids[:1], 4)[1]
    assert moved is not None and moved.shape == (2, 1)
    with pytest.raises(ValueError, match=r"a1q_scale: expected shape \(7, 2\)"):
        vllm.moe_permute(rows, torch.ones(8, 2), ids, 4)


def test_bad_input_names_the_argument() -> None:
    w1, s1, w2, s2 = draw("tensor")
    hidden, routing = torch.randn(TOKENS, HIDDEN).bfloat16(), route()
    fp8 = vllm.fp8_w8a8_moe_quant_config
    one = torch.ones(1)

    def refused(error: type[Exception], words: str, config: object, **changed: Any) -> None:
        arguments = {"w1": w1, "w2": w2, **changed}
        with pytest.raises(error, match=words):
            vllm.fused_experts(
                hidden, topk_weights=routing.topk_weights, topk_ids=routing.topk_ids, quant_config=config, **arguments
            )

    wide = {"w1": w1.bfloat16(), "w2": w2.bfloat16()}
    blocks = torch.ones(4, 3, 2), torch.ones(4, 2, 2)
    mixed = vllm.FusedMoEQuantConfig(INT8, w1_scale=s1, w2_scale=s2)
    alone = vllm.FusedMoEQuantConfig(w1_scale=s1, w2_scale=s2, a1_scale=one)
    own = fp8(s1, s2, None, one, per_act_token_quant=True)
    refused(ValueError, "quant_config: expected one with w1_scale and w2_scale for torch.float8_e4m3fn, got None", None)
    refused(TypeError, r"quant_config.w1_scale: expected a torch.Tensor, got NoneType", vllm.FusedMoEQuantConfig())
    refused(TypeError, "w1: expected dtype float8_e4m3fn or int8 beside quant_config.quant_dtype", fp8(s1, s2), **wide)
    bytes_ = {"w1": w1.view(torch.uint8), "w2": w2.view(torch.uint8)}
    refused(TypeError, "w1: expected dtype float8_e4m3fn or int8, got uint8", None, **bytes_)
    refused(TypeError, "w2: expected dtype float8_e4m3fn", fp8(s1, s2), w2=w2.bfloat16())
    refused(ValueError, r"quant_config.quant_dtype: expected None or torch.float8_e4m3fn", mixed)
    refused(ValueError, r"quant_config.w1_scale: expected shape \(4,\) .* or \(4, 256\)", fp8(s1[:3], s2))
    refused(ValueError, "quant_config.w2_scale: expected one scale per matrix", fp8(s1, torch.ones(4, HIDDEN)))
    refused(ValueError, "quant_config.w1_scale: expected one scale per row", fp8(s1, s2, per_out_ch_quant=True))
    words = r"quant_config.w1_scale: expected shape \(4, 2, 2\) \(blocks"
    refused(ValueError, words, fp8(s1, s2, block_shape=[128, 128]))
    words = "w1: expected gate and up of whole blocks of 96 rows, got 128"
    refused(ValueError, words, fp8(*blocks, block_shape=[96, 96]))
    refused(ValueError, r"quant_config.block_shape: expected \[rows, columns\] of 1", fp8(s1, s2, block_shape=[0, 32]))
    refused(ValueError, "quant_config.a1_scale: expected one scale for all rows", fp8(s1, s2, torch.ones(TOKENS, 1)))
    refused(ValueError, "quant_config.a1_scale: expected a scale beside a2_scale", fp8(s1, s2, None, one))
    refused(ValueError, r"quant_config.a2_scale: expected None \(scales are computed", own)
    refused(ValueError, r"quant_config.a1_scale: expected None \(rows are not quantised", alone)
    described = Described(s1, s2, None)
    described.w1_zp = one  # type: ignore[attr-defined]
    refused(ValueError, "quant_config.w1_zp: expected None", described)


def test_bad_input_of_the_other_names() -> None:
    weights, hidden, routing = draw("tensor"), torch.randn(TOKENS, HIDDEN).bfloat16(), route()
    codes, scale = per_token(hidden)
    w1, s1, w2, s2 = weights
    with pytest.raises(TypeError, match="w1_q: expected dtype float8_e4m3fn"):
        vllm.cutlass_moe_fp8(
            hidden, w1.view(INT8), w2, routing.topk_weights, routing.topk_ids, None, None, None, None, None
        )
    with pytest.raises(ValueError, match=r"quant_config.quant_dtype: expected torch.float8_e4m3fn, got None"):
        vllm.cutlass_moe_fp8(hidden, w1, w2, routing.topk_weights, routing.topk_ids, None, None, None, None, None)
    for words, changed in {
        "expert_num_tokens: expected a tensor for use_batched_format=True": {"use_batched_format": True},
        "expert_num_tokens: expected None for use_batched_format=False": {"expert_num_tokens": COUNTS},
        r"a1q_scale: expected shape \(7, 1\)": {"a1q_scale": torch.ones(1)},
        "a1q_scale: expected one scale, got": {"per_act_token": False},
        "a1q_scale: expected a torch.Tensor": {"a1q_scale": None},
        "out_dtype: expected one of": {"out_dtype": torch.float64},
        r"output: expected shape \(7, 144\)": {"output": torch.empty(2, HIDDEN, dtype=torch.bfloat16)},
        "hidden_states: expected dtype float8_e4m3fn": {"hidden_states": hidden},
        "^w1_scale: expected one scale per row": {"per_out_ch": True},
        "^a2_scale: expected None": {"a2_scale": torch.ones(1)},
        "topk_weights: expected a torch.Tensor": {"topk_weights": None},
        "per_act_token: expected a bool": {"per_act_token": 1},
        "activation: expected one of": {"activation": "situ"},
    }.items():
        with pytest.raises((TypeError, ValueError), match=words):
            run_cutlass(codes, scale, weights, routing, **changed)
    batched = torch.randn(EXPERTS, BATCH, HIDDEN).bfloat16()
    config = vllm.fp8_w8a8_moe_quant_config(s1, s2)
    for words, arguments in {
        "expert_num_tokens: expected shape": (batched, w1, w2, COUNTS[:2], "silu", config),
        "expert_num_tokens: expected dtype int32": (batched, w1, w2, COUNTS.long(), "silu", config),
        "a1q_scale: expected None beside rows": (batched, w1, w2, COUNTS, "silu", config, torch.ones(1)),
        "hidden_states: expected dtype float8_e4m3fn": (batched.to(INT8), w1, w2, COUNTS, "silu", config, s1),
        r"hidden_states: expected shape \(4, 5, 144\)": (batched[:2], w1, w2, COUNTS[:2], "silu", config),
        "hidden_states: expected a 3-D": (hidden, w1, w2, COUNTS, "silu", config),
    }.items():
        with pytest.raises((TypeError, ValueError), match=words):
            vllm.batched_experts(*arguments)
