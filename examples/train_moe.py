"""Trains a small language model on the bytes of Python's manual with experts by moeyard, and with eager ones.

    python examples/train_moe.py --steps 300 --out build/train_moe.svg [--data FILE] [--device cuda] [--autocast]
        [--fp8]

All runs begin with the same weights and see the same bytes. moeyard's run is made twice and has to end in the same
bits. The picture shows the losses, how far they are apart, and which share of the routes each expert gets over time.
What is noise is shown by a second eager run whose first weights are moved by a millionth. The load-balancing loss and
the z-loss are added to that of the bytes, and the selection bias moves after each step. With --autocast products are
bfloat16 and weights float32. With --fp8 moeyard's experts are rounded to e4m3 in blocks, with straight-through
gradients; eager ones are not. Needs matplotlib for the picture (pip install 'moeyard[plot]').
"""

import argparse
import json
import os
import platform
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import moeyard
from moeyard.quant import FP8_BLOCK

TOP_K, EXPERTS, WIDTH, INSIDE, HEADS, LENGTH, BATCH = 2, 8, 64, 96, 4, 64, 8


class Experts(nn.Module):
    """A router and its experts."""

    def __init__(self, eager: bool, fp8: bool = False) -> None:
        """`eager` experts are a loop in plain torch; `fp8` ones are rounded."""
        super().__init__()
        self.eager, self.fp8 = eager, fp8
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.w13 = nn.Parameter(torch.randn(EXPERTS, 2 * INSIDE, WIDTH) * 0.08)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, WIDTH, INSIDE) * 0.08)
        self.register_buffer("bias", torch.zeros(EXPERTS))
        self.ids = torch.empty(0, TOP_K, dtype=torch.int32)
        self.extra = torch.zeros(())

    def forward(self, rows: Tensor) -> Tensor:
        """[tokens, WIDTH] -> [tokens, WIDTH]; `extra` is what is added to the loss, `ids` which experts were chosen."""
        logits = self.router(rows)
        if torch.is_autocast_enabled(rows.device.type):
            rows = rows.to(torch.get_autocast_dtype(rows.device.type))
        if self.eager:
            routing = plain_route(logits, self.bias)
            result = plain_experts(rows, routing, self.w13, self.w2)
        else:
            routing = moeyard.route(logits, top_k=TOP_K, renormalize=True, selection_bias=self.bias)
            weights = moeyard.ExpertWeights(self.w13, self.w2)
            if self.fp8:
                result = moeyard.straight_through_experts(rows, routing, weights, FP8_BLOCK)
            else:
                result = moeyard.fused_experts(rows, routing, weights)
        self.ids = routing.topk_ids
        balance = moeyard.load_balancing_loss(logits, routing.topk_ids)
        self.extra = 0.01 * balance + 0.001 * moeyard.router_z_loss(logits)
        return result


def plain_route(logits: Tensor, bias: Tensor) -> moeyard.Routing:
    """What one writes without a library."""
    scores = torch.softmax(logits, 1)
    ids = torch.topk(scores + bias, TOP_K).indices
    chosen = scores.gather(1, ids)
    return moeyard.Routing(chosen / chosen.sum(1, keepdim=True), ids)


def plain_experts(rows: Tensor, routing: moeyard.Routing, w13: Tensor, w2: Tensor) -> Tensor:
    """What one writes without a library."""
    result = torch.zeros_like(rows)
    for expert in range(EXPERTS):
        token, k = torch.where(routing.topk_ids == expert)
        gate, up = functional.linear(rows[token], w13[expert]).chunk(2, 1)
        row = functional.linear(functional.silu(gate) * up, w2[expert])
        result = result.index_add(0, token, (row * routing.topk_weights[token, k, None]).to(rows.dtype))
    return result


class Block(nn.Module):
    """Attention and experts, each beside a residual."""

    def __init__(self, eager: bool, fp8: bool) -> None:
        """See `Experts`."""
        super().__init__()
        self.first, self.second = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.inward, self.outward = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.experts = Experts(eager, fp8)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, length, WIDTH] -> the same shape."""
        batch, length, _ = hidden.shape
        heads = self.inward(self.first(hidden)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*heads, is_causal=True)
        hidden = hidden + self.outward(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return hidden + self.experts(self.second(hidden).view(-1, WIDTH)).view_as(hidden)


class Model(nn.Module):
    """Bytes -> logits of the next byte."""

    def __init__(self, eager: bool, fp8: bool = False, layers: int = 2) -> None:
        """See `Experts`."""
        super().__init__()
        self.embedding, self.places = nn.Embedding(256, WIDTH), nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block(eager, fp8) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, length] int64 -> [batch, length, 256]."""
        hidden = self.embedding(tokens) + self.places[: tokens.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))


class Run(NamedTuple):
    """What a training run leaves."""

    losses: list[float]
    """Per step, in nats per byte."""
    shares: Tensor
    """[steps, EXPERTS]: the share of the first layer's routes that each expert got."""
    weights: list[Tensor]
    """In the end."""


def train(
    steps: int, *, eager: bool = False, seed: int = 0, nudge: float = 0.0, batch: int = BATCH, device: str = "cpu",
    autocast: bool = False, fp8: bool = False,
) -> Run:  # fmt: skip
    """One run. `nudge` is how far, relative to each, the first weights are moved."""
    torch.manual_seed(seed)
    model, text = Model(eager, fp8).to(device), torch.tensor(list("\n".join(topics.values()).encode()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + nudge)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator, losses, shares = torch.Generator().manual_seed(seed), [], []
    for _ in range(steps):
        starts = torch.randint(0, len(text) - LENGTH - 1, (batch, 1), generator=generator)
        taken = text[starts + torch.arange(LENGTH + 1)].to(device)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            logits = model(taken[:, :-1])
        loss = functional.cross_entropy(logits.float().reshape(-1, 256), taken[:, 1:].reshape(-1))
        (loss + sum(block.experts.extra for block in model.blocks)).backward()
        optimizer.step()
        optimizer.zero_grad()
        for block in model.blocks:
            moeyard.update_selection_bias(block.experts.bias, block.experts.ids, rate=1e-3)
        losses.append(loss.item())
        ids = model.blocks[0].experts.ids.cpu()
        shares.append(torch.bincount(ids.flatten().long(), minlength=EXPERTS) / ids.numel())
    return Run(losses, torch.stack(shares), [parameter.detach() for parameter in model.parameters()])


def apart(one: Run, other: Run) -> float:
    """The mean distance of two loss curves, in nats per byte."""
    return sum(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True)) / len(one.losses)


def plot(mine: Run, eager: Run, moved: Run, out: Path, where: str = "float32 on a CPU") -> None:
    """The losses, their distances, and the shares of moeyard's run, into a PNG or SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    steps = range(1, len(mine.losses) + 1)
    left.plot(steps, eager.losses, label="eager", color="C0", linewidth=2.5, alpha=0.5)
    left.plot(steps, mine.losses, label="moeyard", color="C1", linewidth=0.8)
    left.set(xlabel="step", ylabel="loss, nats per byte")
    for run, label, colour in (
        (moved, "eager, first weights moved by 1e-6", "C0"), (mine, "moeyard", "C1")
    ):  # fmt: skip
        distances = [abs(a - b) for a, b in zip(run.losses, eager.losses, strict=True)]
        middle.plot(steps, distances, label=label, color=colour, linewidth=0.8)
    middle.set(xlabel="step", ylabel="distance to eager's loss, nats per byte", yscale="log")
    right.stackplot(steps, mine.shares.T.numpy(), labels=[f"expert {i}" for i in range(EXPERTS)])
    right.set(xlabel="step", ylabel="share of routes, first layer", ylim=(0, 1), xlim=(1, len(steps)))
    right.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    left.legend(fontsize="small")
    middle.legend(fontsize="small", loc="upper left")
    for axes in (left, middle):
        axes.grid(alpha=0.3)
    figure.suptitle(f"{EXPERTS} experts, top {TOP_K}, bytes of Python's manual, {where}", fontsize="medium")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    pyplot.close(figure)


def main() -> None:
    """Trains four times, compares and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("build/train_moe.svg"))
    parser.add_argument("--data", type=Path, help="a JSON file for losses and shares")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--autocast", action="store_true")
    parser.add_argument("--fp8", action="store_true")
    given = parser.parse_args()
    if given.device == "cuda":  # what surrounds the experts has to repeat its bits, too
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    options: dict[str, Any] = {"device": given.device, "autocast": given.autocast}
    mine, again = (train(given.steps, fp8=given.fp8, **options) for _ in range(2))
    eager, moved = (train(given.steps, eager=True, nudge=nudge, **options) for nudge in (0.0, 1e-6))
    print(f"{'step':>6} {'moeyard':>9} {'eager':>9}")
    for step in sorted({*range(0, given.steps, 50), given.steps - 1}):
        print(f"{step + 1:6} {mine.losses[step]:9.4f} {eager.losses[step]:9.4f}")
    equal = all(torch.equal(a, b) for a, b in zip(mine.weights, again.weights, strict=True))
    found = {"same_bits": equal, "from_eager": apart(mine, eager), "eager_from_moved_eager": apart(moved, eager)}
    print(found)
    gpu = torch.cuda.get_device_name() if given.device == "cuda" else None
    where = f"{'bfloat16 by autocast' if given.autocast else 'float32'} on {gpu or 'a CPU'}"
    where += ", moeyard's experts rounded to e4m3" if given.fp8 else ""
    if given.data is not None:
        machine = {"gpu": gpu, "cores": os.cpu_count(), "system": platform.system(), "torch": str(torch.__version__)}
        curves = {"moeyard": mine, "eager": eager, "eager moved": moved}
        content = {
            "machine": machine, "steps": given.steps, "batch": BATCH, "autocast": given.autocast,
            "fp8": given.fp8, **found,
            "losses": {name: [round(loss, 9) for loss in run.losses] for name, run in curves.items()},
            "shares": [[round(share, 4) for share in step] for step in mine.shares.tolist()],
        }  # fmt: skip
        given.data.parent.mkdir(parents=True, exist_ok=True)
        given.data.write_text(json.dumps(content) + "\n")
    plot(mine, eager, moved, given.out, where)
    print(given.out)


if __name__ == "__main__":
    main()
