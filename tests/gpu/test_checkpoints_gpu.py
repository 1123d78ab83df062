"""load_experts onto a GPU: the bits of a load onto the host, in the caller's stream, without a second copy."""

from pathlib import Path
from typing import Any

import pytest
import torch

import moeyard
from moeyard.testing import checkpoints
from moeyard.testing.checkpoints import FORMS, PREFIX
from moeyard.values import ExpertWeights

pytest.importorskip("safetensors")
SIZES: dict[str, Any] = {"experts": 3, "hidden_size": 192, "intermediate_size": 160}


def load(folder: Path, device: str, **options: Any) -> ExpertWeights:
    return moeyard.load_experts(folder, PREFIX, device=device, **options)


def tensors_of(weights: ExpertWeights) -> list[torch.Tensor]:
    scales = () if weights.scales is None else weights.scales.tensors
    return [t for t in (weights.w13, weights.w2, weights.w13_bias, weights.w2_bias, *scales) if t is not None]


@pytest.mark.filterwarnings("ignore:.*activations of 4 bits are not quantised")
@pytest.mark.parametrize("name", FORMS)
def test_a_gpu_gets_the_bits_of_the_host(name: str, tmp_path: Path) -> None:
    layout = "apart" if "block" in name or "deepseek" in name else "stacked fused"
    checkpoints.write(tmp_path, FORMS[name], layout, **SIZES)
    side = torch.cuda.Stream()
    for options in ({}, {"tensor_parallel": (1, 8), "expert_parallel": (0, 2)}):
        wanted = tensors_of(load(tmp_path, "cpu", **options))
        with torch.cuda.stream(side):
            got = [tensor.clone() for tensor in tensors_of(load(tmp_path, "cuda", **options))]
        side.synchronize()
        for one, two in zip(wanted, got, strict=True):
            assert two.is_cuda and torch.equal(one.view(torch.uint8), two.cpu().view(torch.uint8))


@pytest.mark.parametrize("name", ["bfloat16", "awq", "int8 packed"])
def test_device_memory_holds_the_weights_once(name: str, tmp_path: Path) -> None:
    """Beyond the result: what converting one tensor takes."""
    checkpoints.write(tmp_path, FORMS[name], "apart", experts=8, hidden_size=1024, intermediate_size=1024)
    load(tmp_path, "cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = sum(tensor.nbytes for tensor in tensors_of(load(tmp_path, "cuda")))
    one_matrix = 1024 * 1024 * (2 if name == "bfloat16" else 1)
    assert torch.cuda.max_memory_allocated() - before <= kept + 8 * one_matrix


def test_a_device_that_is_not_current(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    checkpoints.write(tmp_path, FORMS["gptq v1"], "apart", **SIZES)
    wanted, got = (tensors_of(load(tmp_path, device)) for device in ("cpu", "cuda:1"))
    for one, two in zip(wanted, got, strict=True):
        assert two.device.index == 1 and torch.equal(one.view(torch.uint8), two.cpu().view(torch.uint8))
