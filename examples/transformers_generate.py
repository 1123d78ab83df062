"""Tokens per second of a Qwen3-MoE under each of transformers' experts implementations, moeyard's among them.

    python examples/transformers_generate.py [--device cuda] [--out DIRECTORY]
    python examples/transformers_generate.py --small      # a few seconds on a CPU

The model has the proportions of Qwen3-30B-A3B (128 experts of which a token visits 8) and random weights. It has as
many layers as fit into 60 % of the device's memory. Nothing is downloaded. Every implementation first has to answer one
layer as float32 does. One that does not, or that runs out of memory, is named and not timed. Rounds are interleaved: in
each round every implementation runs once, in a new order. A table is printed; `--out` writes results and a picture.
"""

import argparse
import contextlib
import copy
import importlib
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moeyard.bench
from moeyard.bench import peers, results
from moeyard.integrations import transformers as integration

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Root mean square of a layer's error, over that of the layer's results."""
COMPILED = "eager, compiled"


def sizes_of(small: bool) -> dict[str, Any]:
    """The configuration: that of Qwen3-30B-A3B, or an eighth of its widths."""
    if small:
        return {
            "vocab_size": 512, "hidden_size": 256, "intermediate_size": 768, "moe_intermediate_size": 96,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 16,
            "num_experts_per_tok": 4, "norm_topk_prob": True,
        }  # fmt: skip
    return {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True,
    }  # fmt: skip


def layers_that_fit(sizes: dict[str, Any], device: torch.device, dtype: torch.dtype) -> int:
    """Layers whose weights take 60 % of the memory that is free; 48 at most."""
    layer = 3 * sizes["num_experts"] * sizes["moe_intermediate_size"] * sizes["hidden_size"] * dtype.itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 4 << 30
    return max(1, min(48, int(0.6 * free / layer)))


def make_model(sizes: dict[str, Any], layers: int, device: torch.device, dtype: torch.dtype) -> Qwen3MoeForCausalLM:
    """A model with random weights, made on its device."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(num_hidden_layers=layers, max_position_embeddings=8192, dtype=dtype, **sizes)
    with device:
        return Qwen3MoeForCausalLM(config).to(dtype).eval().requires_grad_(False)


def implementations(device: torch.device, dtype: torch.dtype, compiled: bool) -> list[str]:
    """Those of transformers that load here, and moeyard's."""
    found = ["eager", "batched_mm", "grouped_mm", *([COMPILED] if compiled else []), integration.NAME]
    if device.type == "cuda" and dtype == torch.bfloat16:
        found += [name for name in ("deepgemm", "sonicmoe") if _loads(name)]
    return found


def _loads(name: str) -> bool:
    """Whether transformers finds what one of its implementations needs."""
    with contextlib.suppress(ImportError, AttributeError):
        return bool(getattr(importlib.import_module(f"transformers.integrations.{name}"), f"is_{name}_loadable")())
    return False


def error_of(model: Qwen3MoeForCausalLM, implementation: str, num_tokens: int) -> float:
    """The error of the first layer's experts against eager ones in float32, as `BOUNDS` has it."""
    layer = model.model.layers[0].mlp
    rows = torch.randn(num_tokens, model.config.hidden_size, device=model.device).to(model.dtype)
    _, weights, ids = layer.gate(rows)
    wide = copy.deepcopy(layer.experts).float()
    wide.config = copy.deepcopy(model.config)
    wide.config._experts_implementation = "eager"
    wanted = wide(rows.float(), ids, weights.float())
    with using(model, implementation):
        error = layer.experts(rows, ids, weights).float() - wanted
    return float(error.square().mean().sqrt() / wanted.square().mean().sqrt())


@contextlib.contextmanager
def using(model: Qwen3MoeForCausalLM, implementation: str) -> Iterator[Callable[..., Any]]:
    """The model's forward with an implementation."""
    compiled = implementation == COMPILED
    model.set_experts_implementation("eager" if compiled else implementation)
    if compiled and not hasattr(model, "compiled_forward"):
        model.compiled_forward = torch.compile(model.forward, dynamic=False)
    yield model.compiled_forward if compiled else model.forward


def prefill(forward: Callable[..., Any], tokens: Tensor) -> float:
    """Seconds for a prompt."""
    start = _now(tokens.device)
    forward(input_ids=tokens, use_cache=False, logits_to_keep=1)
    return _now(tokens.device) - start


def decode(forward: Callable[..., Any], tokens: Tensor, steps: int) -> float:
    """Seconds for `steps` tokens, one at a time, after a prompt that is not timed."""
    cache = DynamicCache()
    forward(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = tokens[:, -1:]
    start = _now(tokens.device)
    for _ in range(steps):
        output = forward(input_ids=token, past_key_values=cache, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    return _now(tokens.device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def measure(model: Qwen3MoeForCausalLM, names: list[str], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per implementation and phase: samples in tokens per second, or why there are none."""
    prompt = torch.randint(0, model.config.vocab_size, (1, arguments.tokens), device=model.device)
    short = prompt[:, : min(64, arguments.tokens)]
    phases: dict[str, tuple[int, Callable[[Any], float]]] = {
        f"prefill of {arguments.tokens} tokens": (arguments.tokens, lambda forward: prefill(forward, prompt)),
        "decode": (arguments.steps, lambda forward: decode(forward, short, arguments.steps)),
    }
    rows = []
    for phase, (tokens, run) in phases.items():
        mine = {name: {"implementation": name, "phase": phase, "problem": "", "tokens_per_s": []} for name in names}
        for name, row in mine.items():
            with stopped_by(row):
                row["error"] = error = error_of(model, name, min(arguments.tokens, 256))
                if not error <= BOUNDS[model.dtype]:
                    row["problem"] = f"wrong: error {error:.1e} of a layer, allowed {BOUNDS[model.dtype]:.0e}"
                    continue
                with using(model, name) as forward:
                    run(forward), run(forward)
        for _ in range(arguments.rounds):
            able = [name for name in names if not mine[name]["problem"]]
            for name in random.sample(able, len(able)):
                with stopped_by(mine[name]), using(model, name) as forward:
                    mine[name]["tokens_per_s"].append(tokens / run(forward))
        rows += mine.values()
    for row in rows:
        low, middle, high = quartiles(row["tokens_per_s"]) if not row["problem"] else (None, None, None)
        row.update(median=middle, quartiles=[low, high])
    return rows


@contextlib.contextmanager
def stopped_by(row: dict[str, Any]) -> Iterator[None]:
    """Keeps what an implementation stops at; ours stops the script."""
    try:
        yield
    except Exception as problem:
        if row["implementation"] == integration.NAME:
            raise
        row["problem"] = f"{type(problem).__name__}: {str(problem).splitlines()[0][:120] if str(problem) else ''}"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high


def document(model: Qwen3MoeForCausalLM, rows: list[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """The results with all that they depend on."""
    device = model.device
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": results.commit_of(Path(moeyard.bench.__file__).parent),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "versions": {"moeyard": moeyard.__version__, **peers.versions(device)},
        "model": {**sizes_of(arguments.small), "num_hidden_layers": model.config.num_hidden_layers},
        "dtype": str(model.dtype).removeprefix("torch."),
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "rows": rows,
    }


def draw(content: dict[str, Any], out: Path) -> None:
    """One half per phase, one bar per implementation, quartiles as whiskers; the reason where there is no bar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    phases = list(dict.fromkeys(row["phase"] for row in content["rows"]))
    figure, halves = pyplot.subplots(1, len(phases), figsize=(11, 3.8), layout="constrained")
    for axes, phase in zip(halves, phases, strict=True):
        rows = [row for row in content["rows"] if row["phase"] == phase][::-1]
        for place, row in enumerate(rows):
            if row["problem"]:
                axes.text(0, place, f" {row['problem'][:44]}", va="center", fontsize="x-small")
                continue
            low, high = row["quartiles"]
            spread = [[row["median"] - low], [high - row["median"]]]
            ours = row["implementation"] == integration.NAME
            axes.barh(place, row["median"], xerr=spread, color="C0" if ours else "0.7", capsize=3)
            axes.text(high, place, f"  {row['median']:.4g}", va="center", fontsize="small")
        axes.set(title=phase, xlabel="tokens per second (median, quartiles)", xmargin=0.2)
        axes.set_yticks(range(len(rows)), [row["implementation"] for row in rows])
        axes.set_xlim(left=0)
    model, versions = content["model"], content["versions"]
    figure.suptitle(
        f"Qwen3-MoE, {model['num_hidden_layers']} layers of {model['num_experts']} experts, top "
        f"{model['num_experts_per_tok']}, {content['dtype']}, {content['device']}, {content['date'][:10]}, "
        f"transformers {versions['transformers']}, torch {versions['torch']}",
        fontsize="medium",
    )
    figure.savefig(out, dpi=130)
    pyplot.close(figure)


def parse(given: list[str] | None = None) -> argparse.Namespace:
    """The arguments, with defaults that depend on others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=[str(dtype).removeprefix("torch.") for dtype in BOUNDS])
    parser.add_argument("--small", action="store_true", help="a model of a few megabytes")
    parser.add_argument("--layers", type=int, help="layers; as many as fit unless given")
    parser.add_argument("--tokens", type=int, help="tokens of the prompt; 4096, with --small 64")
    parser.add_argument("--steps", type=int, default=16, help="tokens that a decode makes")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, help="compiled eager; on a GPU by default")
    parser.add_argument("--out", type=Path, help="folder for transformers_generate.json and .png")
    arguments = parser.parse_args(given)
    on_gpu = torch.device(arguments.device).type == "cuda"
    arguments.dtype = arguments.dtype or ("bfloat16" if on_gpu else "float32")
    arguments.tokens = arguments.tokens or (64 if arguments.small else 4096)
    arguments.compiled = on_gpu if arguments.compiled is None else arguments.compiled
    return arguments


def main(given: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints and writes; returns the results."""
    arguments = parse(given)
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    sizes = sizes_of(arguments.small)
    layers = arguments.layers or (2 if arguments.small else layers_that_fit(sizes, device, dtype))
    model = make_model(sizes, layers, device, dtype)
    for way in integration.prepare(model)[:1]:
        print(way)
    rows = measure(model, implementations(device, dtype, arguments.compiled), arguments)
    content = document(model, rows, arguments)
    print(f"{'phase':26} {'experts':16} {'tokens/s':>10}  quartiles")
    for row in rows:
        low, high = row["quartiles"]
        told = row["problem"] or f"{row['median']:10.1f}  {low:.1f} to {high:.1f}"
        print(f"{row['phase']:26} {row['implementation']:16} {told}")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "transformers_generate.json").write_text(json.dumps(content, indent=1) + "\n")
        draw(content, arguments.out / "transformers_generate.png")
    return content


if __name__ == "__main__":
    main()
