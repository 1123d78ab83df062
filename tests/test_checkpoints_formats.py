"""load_experts: every format in every layout, whole and in shares, against weights computed value by value."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moeyard
import moeyard.quant
from moeyard.reference.quant import dequantised
from moeyard.testing import checkpoints
from moeyard.testing.checkpoints import FORMS, LAYOUTS, PREFIX, Form, Written
from moeyard.values import ExpertWeights

pytest.importorskip("safetensors")
HIDDEN, SIZE = 192, 160
NOT_FUSED = ("fp8 blocks", "deepseek", "deepseek ue8m0")
"""Their grids of gate and up begin anew: 160 rows are no whole blocks of 128."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These layers are too small to be worth more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(folder: Path, **options: Any) -> ExpertWeights:
    return moeyard.load_experts(folder, PREFIX, **{"device": "cpu", **options})


def same(weights: ExpertWeights, wanted: Written) -> None:
    """What the reference makes of weights is what was written, exactly; and operators take them."""
    for got, values in zip(dequantised(weights), wanted, strict=True):
        assert got.shape == values.shape and torch.equal(got, values)
    dtype = torch.bfloat16 if weights.scheme is not None else weights.w13.dtype
    routing = moeyard.Routing(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int32))
    rows = torch.randn(2, weights.hidden_size).to(dtype)
    assert moeyard.fused_experts(rows, routing, weights, impl="torch").isfinite().all()


def share(wanted: Written, experts: slice, rows: slice) -> Written:
    halves = wanted.w13.unflatten(1, (2, -1))[experts, :, rows]
    return Written(halves.flatten(1, 2), wanted.w2[experts, :, rows])


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.filterwarnings("ignore:.*activations of 4 bits are not quantised")
def test_every_format_gives_the_weights_that_were_written(name: str, tmp_path: Path) -> None:
    for layout in LAYOUTS:
        if "fused" in layout and name in NOT_FUSED:
            continue
        wanted = checkpoints.write(tmp_path / layout, FORMS[name], layout)
        same(load(tmp_path / layout), wanted)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.filterwarnings("ignore:.*activations of 4 bits are not quantised")
def test_a_share_is_that_part_of_the_whole(name: str, tmp_path: Path) -> None:
    """Shares of 160 / 2 and 160 / 8 rows begin inside blocks of 128, groups of 32, words of 8 (traps 11, 12)."""
    for layout in ("apart", "stacked fused"):
        if "fused" in layout and name in NOT_FUSED:
            continue
        wanted = checkpoints.write(tmp_path / layout, FORMS[name], layout)
        for parts in (2, 8):
            for rank in {0, 1, parts - 1}:
                size = SIZE // parts
                got = load(tmp_path / layout, tensor_parallel=(rank, parts), expert_parallel=(0, 2))
                same(got, share(wanted, slice(0, 2), slice(rank * size, rank * size + size)))
                if got.scales is not None and got.scheme is not None:
                    assert got.scales.block_start == rank * size % got.scheme.period
        same(load(tmp_path / layout, expert_parallel=(1, 2)), share(wanted, slice(2, 3), slice(None)))


@pytest.mark.parametrize("order", ["up first", "in turn"])
@pytest.mark.parametrize(
    "name", ["bfloat16", "fp8 channel", "fp8 tensor", "int4 packed, zero points", "awq", "gptq v1", "mxfp4"]
)
def test_orders_of_gate_and_up(name: str, order: str, tmp_path: Path) -> None:
    """Trap 24: one half, then the other, or row by row; the wrong order gives other weights."""
    for layout in ("fused", "stacked fused"):
        wanted = checkpoints.write(tmp_path / layout, FORMS[name], layout, order=order)
        same(load(tmp_path / layout, gate_up_order=order), wanted)
        same(
            load(tmp_path / layout, gate_up_order=order, tensor_parallel=(1, 8)),
            share(wanted, slice(None), slice(20, 40)),
        )
        assert not torch.equal(dequantised(load(tmp_path / layout))[0], wanted.w13)


def int32(number: int) -> int:
    return number - (1 << 32) if number >= 1 << 31 else number


SHIFTED = torch.eye(8).roll(1, 1).double()
"""Row r is 1 in column r + 1 and 0 elsewhere: no packing order or axis can be taken for another."""
AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in an AWQ word column 0, 1, ... is."""
EIGHTS = 0x88888888


def one_hots(name: str) -> dict[str, torch.Tensor]:
    """The 8 x 8 matrix `SHIFTED` in a format: one bit for each position in its words, written by hand."""
    ones = torch.ones(8, 1, dtype=torch.bfloat16)
    if name == "pack 4":
        rows = [[int32(EIGHTS + (1 << 4 * ((row + 1) % 8)))] for row in range(8)]
        return {"weight_packed": torch.tensor(rows, dtype=torch.int32), "weight_scale": ones}
    if name == "pack 8":
        rows = [[int32(0x80808080 + ((1 << 8 * (hot % 4)) if hot // 4 == word else 0)) for word in (0, 1)]
                for hot in ((row + 1) % 8 for row in range(8))]  # fmt: skip
        return {"weight_packed": torch.tensor(rows, dtype=torch.int32), "weight_scale": ones}
    zeros = torch.full((1, 1), int32(EIGHTS), dtype=torch.int32)
    if name == "gptq":
        columns = [int32(EIGHTS + (1 << 4 * ((row + 1) % 8))) for row in range(8)]
        words = torch.tensor([columns], dtype=torch.int32)
        return {"qweight": words, "scales": ones.t().half().contiguous(), "qzeros": zeros}
    if name == "awq":
        rows = [[int32(EIGHTS + (1 << 4 * AWQ_NIBBLES[(column - 1) % 8]))] for column in range(8)]
        return {
            "qweight": torch.tensor(rows, dtype=torch.int32),
            "scales": ones.t().half().contiguous(),
            "qzeros": zeros,
        }
    assert name == "mxfp4"
    rows = [[(2 << 4 * (hot % 2)) if hot // 2 == byte else 0 for byte in range(4)]
            for hot in ((row + 1) % 8 for row in range(8))]  # fmt: skip
    return {
        "weight_packed": torch.tensor(rows, dtype=torch.uint8),
        "weight_scale": torch.full((8, 1), 127, dtype=torch.uint8),
    }


CHANNELS = {"strategy": "channel"}
HOT_CONFIGS = {
    "pack 4": checkpoints.compressed("pack-quantized", {**checkpoints.INT4, **CHANNELS}),
    "pack 8": checkpoints.compressed("pack-quantized", {**checkpoints.INT8, **CHANNELS}),
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": True, "checkpoint_format": "gptq_v2"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": -1, "zero_point": True, "version": "gemm"},
    "mxfp4": FORMS["mxfp4"].config,
}


@pytest.mark.parametrize("name", HOT_CONFIGS)
def test_one_hot_weights_at_every_position_of_a_word(name: str, tmp_path: Path) -> None:
    """Trap 15: each packing order, against words written by hand."""
    tensors = {
        f"{PREFIX}.0.{part}.{what}": tensor.clone()
        for part in ("gate_proj", "up_proj", "down_proj")
        for what, tensor in one_hots(name).items()
    }
    checkpoints.save(tmp_path, tensors, HOT_CONFIGS[name])
    same(load(tmp_path), Written(torch.cat((SHIFTED, SHIFTED))[None], SHIFTED[None]))


@pytest.mark.parametrize("axis", ["compressed-tensors", "awq", "gptq"])
def test_one_hot_zero_points(axis: str, tmp_path: Path) -> None:
    """Trap 16: zero points are packed along the rows of a weight, AWQ's in its own order."""
    size, group = 8, 2
    config = HOT_CONFIGS["pack 4"] if axis == "compressed-tensors" else HOT_CONFIGS[axis]
    config = {**config, "group_size": group, "sym": False} if axis != "compressed-tensors" else checkpoints.compressed(
        "pack-quantized", {**checkpoints.INT4, "symmetric": False, "strategy": "group", "group_size": group}
    )  # fmt: skip
    wanted = torch.zeros(size, 4, dtype=torch.uint8)
    wanted[range(8), [row % 4 for row in range(8)]] = torch.arange(1, 9).to(torch.uint8)
    spots = AWQ_NIBBLES if axis == "awq" else tuple(range(8))
    words = [int32(sum(int(wanted[row, column]) << 4 * spots[row] for row in range(8))) for column in range(4)]
    codes = torch.randint(-(2**31), 2**31, (8, 1), dtype=torch.int64).to(torch.int32)
    scale = torch.ones(8, 4, dtype=torch.float16)
    if axis == "compressed-tensors":
        zero = torch.tensor([words], dtype=torch.int32)
        matrix = {"weight_packed": codes, "weight_scale": scale, "weight_zero_point": zero}
    else:
        codes = codes if axis == "awq" else codes.t().contiguous()
        matrix = {
            "qweight": codes,
            "scales": scale.t().contiguous(),
            "qzeros": torch.tensor(words, dtype=torch.int32)[:, None],
        }
    tensors = {
        f"{PREFIX}.0.{part}.{what}": tensor.clone()
        for part in ("gate_proj", "up_proj", "down_proj")
        for what, tensor in matrix.items()
    }
    checkpoints.save(tmp_path, tensors, config)
    scales = load(tmp_path).scales
    assert scales is not None and scales.w2_zero_points is not None and scales.w13_zero_points is not None
    assert torch.equal(scales.w2_zero_points[0], wanted)
    assert torch.equal(scales.w13_zero_points[0], torch.cat((wanted, wanted)))


def test_zero_points_of_version_1_wrap_around(tmp_path: Path) -> None:
    """Trap 16: version 1 stores the zero point less 1, so 15 stands for 0 and not for 16."""
    for version, stored, wanted in ((1, 15, 0), (1, 0, 1), (1, 7, 8), (2, 15, 15), (2, 0, 0)):
        tensors = one_hots("gptq")
        tensors["qzeros"] = torch.full((1, 1), int32(stored * 0x11111111), dtype=torch.int32)
        every = {f"{PREFIX}.0.{part}.{what}": t.clone() for part in ("w1", "w2", "w3") for what, t in tensors.items()}
        config = {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": False}
        checkpoints.save(tmp_path, every, {**config, "checkpoint_format": "gptq_v2" if version == 2 else "gptq"})
        scales = load(tmp_path).scales
        assert scales is not None and scales.w2_zero_points is not None
        assert scales.w2_zero_points.unique().tolist() == [wanted]


@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("stored", [7, 8, 9])
def test_symmetric_files_may_have_zero_points_of_either_version(label: str, stored: int, tmp_path: Path) -> None:
    """Trap 16: files labelled 1 hold zero points of 2, so 7 and 8 both mean 8; anything else is an error."""
    tensors = one_hots("gptq")
    tensors["qzeros"] = torch.full((1, 1), int32(stored * 0x11111111), dtype=torch.int32)
    every = {f"{PREFIX}.0.{part}.{what}": t.clone() for part in ("w1", "w2", "w3") for what, t in tensors.items()}
    config = {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": True, "checkpoint_format": label}
    checkpoints.save(tmp_path, every, config)
    if stored == 9:
        with pytest.raises(
            ValueError, match=r"qzeros: expected 7 or 8 in all zero points of a symmetric scheme, got \[9\]"
        ):
            load(tmp_path)
        return
    same(load(tmp_path), Written(torch.cat((SHIFTED, SHIFTED))[None], SHIFTED[None]))


GPT_OSS = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def gpt_oss(
    folder: Path, experts: int = 2, hidden_size: int = 96, size: int = 96
) -> tuple[Written, torch.Tensor, torch.Tensor]:
    """gpt-oss's form: blocks of 32 columns in 16 bytes, rows of gate and up in turn, biases."""
    both, down = FORMS["mxfp4"].draw(experts * 2 * size, hidden_size), FORMS["mxfp4"].draw(experts * hidden_size, size)
    biases = torch.randn(experts, 2 * size).bfloat16(), torch.randn(experts, hidden_size).bfloat16()
    tensors = {}
    for name, drawn, rows, bias in (
        ("gate_up_proj", both, 2 * size, biases[0]),
        ("down_proj", down, hidden_size, biases[1]),
    ):
        tensors[f"{PREFIX}.{name}_blocks"] = drawn.tensors["weight_packed"].view(experts, rows, -1, 16)
        tensors[f"{PREFIX}.{name}_scales"] = drawn.tensors["weight_scale"].view(experts, rows, -1)
        tensors[f"{PREFIX}.{name}_bias"] = bias
    checkpoints.save(folder, tensors, GPT_OSS, model_type="gpt_oss", num_local_experts=experts)
    rows = both.values.view(experts, 2 * size, hidden_size)
    written = Written(torch.cat((rows[:, 0::2], rows[:, 1::2]), 1), down.values.view(experts, hidden_size, size))
    return written, torch.cat((biases[0][:, 0::2], biases[0][:, 1::2]), 1), biases[1]


def test_gpt_oss_in_mxfp4(tmp_path: Path) -> None:
    """Traps 13, 24: rows in turn, groups of 32; shares of 96 / 4 rows begin inside groups. Rank 0 has w2's bias."""
    wanted, first, second = gpt_oss(tmp_path)
    got = load(tmp_path)
    same(got, wanted)
    assert torch.equal(got.w13_bias, first) and torch.equal(got.w2_bias, second)  # type: ignore[arg-type]
    for rank in range(4):
        got = load(tmp_path, tensor_parallel=(rank, 4), expert_parallel=(1, 2))
        rows = slice(24 * rank, 24 * rank + 24)
        same(got, share(wanted, slice(1, 2), rows))
        assert torch.equal(got.w13_bias, first.unflatten(1, (2, -1))[1:, :, rows].flatten(1))  # type: ignore[arg-type]
        assert got.w2_bias is None if rank else torch.equal(got.w2_bias, second[1:])  # type: ignore[arg-type]


def test_gpt_oss_in_bfloat16_is_transposed(tmp_path: Path) -> None:
    """Trap 24: [experts, hidden_size, 2 * intermediate_size], in turn: what `experts_from_interleaved` takes."""
    stored = {
        "gate_up_proj": torch.randn(2, 48, 64).bfloat16(), "gate_up_proj_bias": torch.randn(2, 64).bfloat16(),
        "down_proj": torch.randn(2, 32, 48).bfloat16(), "down_proj_bias": torch.randn(2, 48).bfloat16(),
    }  # fmt: skip
    tensors = {f"{PREFIX}.{name}": tensor for name, tensor in stored.items()}
    checkpoints.save(tmp_path, tensors, None, model_type="gpt_oss")
    got, wanted = load(tmp_path), moeyard.experts_from_interleaved(**stored)  # type: ignore[arg-type]
    for name in ("w13", "w2", "w13_bias", "w2_bias"):
        assert torch.equal(getattr(got, name), getattr(wanted, name))
    part = load(tmp_path, tensor_parallel=(1, 2), dtype=torch.float32)
    assert torch.equal(part.w13, wanted.w13.unflatten(1, (2, 32))[:, :, 16:].flatten(1, 2).float())
    assert torch.equal(part.w2, wanted.w2[:, :, 16:].float()) and part.w13_bias.dtype == torch.float32  # type: ignore[union-attr]
    checkpoints.save(tmp_path, tensors, None)
    with pytest.raises(ValueError, match="gate_up_order: expected one of"):
        load(tmp_path)
    assert torch.equal(load(tmp_path, gate_up_order="in turn").w13, wanted.w13)


def test_stacked_and_transposed_halves(tmp_path: Path) -> None:
    """The form of models that multiply from the right: no biases, one half and then the other."""
    gate_up, down = torch.randn(2, 48, 64), torch.randn(2, 32, 48)
    checkpoints.save(
        tmp_path, {f"{PREFIX}.gate_up_proj": gate_up, f"{PREFIX}.down_proj": down}, None, model_type="other"
    )
    got = load(tmp_path)
    assert torch.equal(got.w13, gate_up.transpose(1, 2)) and torch.equal(got.w2, down.transpose(1, 2))


def test_experts_without_a_gate(tmp_path: Path) -> None:
    form = FORMS["fp8 channel"]
    drawn = {f"{PREFIX}.{expert}.{name}": form.draw(*shape) for expert in range(2)
             for name, shape in (("up_proj", (SIZE, HIDDEN)), ("down_proj", (HIDDEN, SIZE)))}  # fmt: skip
    tensors = {f"{name}.{what}": tensor for name, layer in drawn.items() for what, tensor in layer.tensors.items()}
    checkpoints.save(tmp_path, tensors, form.config)
    first, second = (
        torch.stack([drawn[f"{PREFIX}.{expert}.{name}"].values for expert in range(2)])
        for name in ("up_proj", "down_proj")
    )
    same(load(tmp_path, gated=False), Written(first, second))
    with pytest.raises(ValueError, match=rf"tensor {PREFIX}\.0\.gate\.\* is missing"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["fp8 tensor", "fp8 tensor static", "modelopt fp8"])
def test_scales_of_gate_and_up_are_both_kept(name: str, tmp_path: Path) -> None:
    """Trap 3: nothing is requantised. Static scales of activations: the larger one, as gate and up share rows."""
    checkpoints.write(tmp_path, FORMS[name], "apart")
    from safetensors.torch import load_file

    stored, got = load_file(tmp_path / "model.safetensors"), load(tmp_path)
    assert got.scales is not None
    for expert in range(3):
        one, two, three = (f"{PREFIX}.{expert}.{part}_proj" for part in ("gate", "up", "down"))
        scales = [float(stored[f"{linear}.weight_scale"]) for linear in (one, two)]
        assert got.scales.w13[expert, :, 0].tolist() == scales and scales[0] != scales[1]
        if got.scales.w13_input is not None and got.scales.w2_input is not None:
            inputs = [float(stored[f"{linear}.input_scale"]) for linear in (one, two, three)]
            assert (
                float(got.scales.w13_input[expert]) == max(inputs[:2])
                and float(got.scales.w2_input[expert]) == inputs[2]
            )
    assert (got.scales.w13_input is None) == (name == "fp8 tensor")


def test_global_scales_divide_or_multiply_and_are_two(tmp_path: Path) -> None:
    """Traps 4, 5: compressed-tensors' divide, ModelOpt's multiply; gate's and up's are kept apart."""
    from safetensors.torch import load_file

    for name, what in (("nvfp4", "weight_global_scale"), ("modelopt nvfp4", "weight_scale_2")):
        checkpoints.write(tmp_path, FORMS[name], "apart")
        stored = load_file(tmp_path / "model.safetensors")
        raw = torch.cat([stored[f"{PREFIX}.1.{part}_proj.{what}"] for part in ("gate", "up")])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scales = load(tmp_path).scales
        assert scales is not None and scales.w13_global is not None
        assert torch.equal(scales.w13_global[1], raw if what == "weight_scale_2" else 1 / raw) and raw[0] != raw[1]


def test_activations_that_stay_as_they_are_are_told(tmp_path: Path) -> None:
    """Trap 22: "local" scales of NVFP4, powers of two of MXFP8: a warning, and a scheme of weights alone."""
    checkpoints.write(tmp_path, FORMS["modelopt nvfp4"], "apart")
    with pytest.warns(UserWarning, match="activations of 4 bits are not quantised: rows stay in their dtype"):
        assert load(tmp_path).scheme == moeyard.quant.NVFP4
    local = {**checkpoints.FP4, "strategy": "tensor_group", "group_size": 16, "dynamic": "local", "symmetric": True}
    weights = {**checkpoints.FP4, "strategy": "tensor_group", "group_size": 16}
    form = Form(checkpoints.compressed("nvfp4-pack-quantized", weights, local), FORMS["nvfp4"].draw)
    checkpoints.write(tmp_path, form, "apart")
    with pytest.warns(UserWarning, match="activations of 4 bits"):
        assert load(tmp_path).scheme == moeyard.quant.NVFP4
    group = {**checkpoints.FP8, **checkpoints.GROUPS, "dynamic": True, "symmetric": True, "scale_dtype": "torch.uint8"}
    weights = {**checkpoints.FP8, **checkpoints.GROUPS, "scale_dtype": "torch.uint8"}
    checkpoints.write(
        tmp_path, Form(checkpoints.compressed("mxfp8-quantized", weights, group), FORMS["mxfp8"].draw), "apart"
    )
    with pytest.warns(UserWarning, match="activations whose scales are powers of two"):
        assert str(load(tmp_path).scheme) == "e4m3 1x32 e8m0 scales"


def with_codes(folder: Path, name: str, what: str, codes: torch.Tensor) -> ExpertWeights:
    """The experts of a format, one tensor of w2 of the first expert replaced by codes, byte by byte."""
    from safetensors.torch import load_file

    checkpoints.write(folder, FORMS[name], "apart")
    tensors = load_file(folder / "model.safetensors")
    key = f"{PREFIX}.0.down_proj.{what}"
    tensors[key].view(torch.uint8).flatten()[: codes.numel()] = codes
    checkpoints.save(folder, tensors, FORMS[name].config)
    return load(folder)


def test_unusual_codes_are_kept_bit_by_bit(tmp_path: Path) -> None:
    """Traps 7, 8, 10: NaN in e4m3; powers of two from 2^-127 to NaN; negative and zero NVFP4 scales; -128 in int8."""
    every = torch.arange(256, dtype=torch.int64).to(torch.uint8)
    for name in ("fp8 channel", "int8 channel"):
        got = with_codes(tmp_path, name, "weight", every)
        assert torch.equal(got.w2[0].view(torch.uint8).flatten()[:256], every)
    for name in ("mxfp4", "nvfp4", "mxfp8"):
        got = with_codes(tmp_path, name, "weight_scale", every)
        assert got.scales is not None
        assert torch.equal(got.scales.w2[0].view(torch.uint8).flatten()[:256], every)
    got = with_codes(
        tmp_path, "deepseek ue8m0", "weight_scale_inv", torch.tensor([0, 254, 255, 127], dtype=torch.uint8)
    )
    assert got.scales is not None and got.scales.w2.dtype == torch.float32
    assert got.scales.w2[0].flatten()[:2].tolist() == [2.0**-127, 2.0**127]
    assert got.scales.w2[0].isnan().flatten().tolist() == [False, False, True, False]


def test_weight_scale_inv_multiplies(tmp_path: Path) -> None:
    """Trap 6: by its name it would divide."""
    tensors = {}
    for part in ("gate_proj", "up_proj", "down_proj"):
        tensors[f"{PREFIX}.0.{part}.weight"] = torch.full((16, 16), 2.0).to(torch.float8_e4m3fn)
        tensors[f"{PREFIX}.0.{part}.weight_scale_inv"] = torch.full((1, 1), 4.0)
    checkpoints.save(tmp_path, tensors, checkpoints.DEEPSEEK)
    assert all(bool((matrix == 8).all()) for matrix in dequantised(load(tmp_path)))


@pytest.mark.parametrize("shape", [(160, 1), (160,)])
def test_scales_of_rows_may_lack_their_last_axis(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Trap 6: [N] for [N, 1]."""
    form = FORMS["fp8 channel"]

    def draw(rows: int, columns: int) -> checkpoints.Drawn:
        values, tensors = form.draw(rows, columns)
        return checkpoints.Drawn(values, {**tensors, "weight_scale": tensors["weight_scale"].view(rows, *shape[1:])})

    for layout in ("apart", "stacked fused"):
        wanted = checkpoints.write(tmp_path / layout, Form(form.config, draw), layout)
        same(load(tmp_path / layout), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_keep_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """Trap 18: float16 scales of a bfloat16 model and the reverse are never rounded."""

    def draw(rows: int, columns: int) -> checkpoints.Drawn:
        _, tensors = FORMS["fp8 channel"].draw(rows, columns)
        scale = (torch.rand(rows, 1) * 1e-4).to(dtype)
        return checkpoints.Drawn(tensors["weight"].double() * scale.double(), {**tensors, "weight_scale": scale})

    wanted = checkpoints.write(tmp_path, Form(FORMS["fp8 channel"].config, draw), "apart")
    got = load(tmp_path)
    same(got, wanted)
    assert got.scales is not None and got.scales.w13.dtype == dtype
