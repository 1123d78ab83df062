"""Trains a small language model on the bytes of Python's manual, twice: experts by moeyard, and eager ones.

    python examples/train_moe.py --steps 300 --out build/train_moe.svg

The picture shows the loss of both runs, and which share of the routes each expert gets over time. Both runs begin with
the same weights and see the same bytes. The load-balancing loss and the z-loss are added to that of the bytes, and the
selection bias moves after each step. Needs matplotlib for the picture (pip install 'moeyard[plot]').
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import moeyard

TOP_K, EXPERTS, WIDTH, INSIDE, HEADS, LENGTH, BATCH = 2, 8, 64, 96, 4, 64, 8


class Experts(nn.Module):
    """A router and its experts."""

    def __init__(self, eager: bool) -> None:
        """`eager` experts are a loop in plain torch."""
        super().__init__()
        self.eager = eager
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.w13 = nn.Parameter(torch.randn(EXPERTS, 2 * INSIDE, WIDTH) * 0.08)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, WIDTH, INSIDE) * 0.08)
        self.register_buffer("bias", torch.zeros(EXPERTS))
        self.ids = torch.empty(0, TOP_K, dtype=torch.int32)
        self.extra = torch.zeros(())

    def forward(self, rows: Tensor) -> Tensor:
        """[tokens, WIDTH] -> [tokens, WIDTH]; `extra` is what is added to the loss, `ids` which experts were chosen."""
        logits = self.router(rows)
        if self.eager:
            routing = plain_route(logits, self.bias)
            result = plain_experts(rows, routing, self.w13, self.w2)
        else:
            routing = moeyard.route(logits, top_k=TOP_K, renormalize=True, selection_bias=self.bias)
            result = moeyard.fused_experts(rows, routing, moeyard.ExpertWeights(self.w13, self.w2))
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
        result = result.index_add(0, token, row * routing.topk_weights[token, k, None])
    return result


class Block(nn.Module):
    """Attention and experts, each beside a residual."""

    def __init__(self, eager: bool) -> None:
        """See `Experts`."""
        super().__init__()
        self.first, self.second = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.inward, self.outward = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.experts = Experts(eager)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, length, WIDTH] -> the same shape."""
        batch, length, _ = hidden.shape
        heads = self.inward(self.first(hidden)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*heads, is_causal=True)
        hidden = hidden + self.outward(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return hidden + self.experts(self.second(hidden).view(-1, WIDTH)).view_as(hidden)


class Model(nn.Module):
    """Bytes -> logits of the next byte."""

    def __init__(self, eager: bool, layers: int = 2) -> None:
        """See `Experts`."""
        super().__init__()
        self.embedding, self.places = nn.Embedding(256, WIDTH), nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block(eager) for _ in range(layers))
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


def train(steps: int, *, eager: bool = False, seed: int = 0, nudge: float = 0.0, batch: int = BATCH) -> Run:
    """One run on the CPU. `nudge` is how far, relative to each, the first weights are moved."""
    torch.manual_seed(seed)
    model, text = Model(eager), torch.tensor(list("\n".join(topics.values()).encode()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + nudge)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator, losses, shares = torch.Generator().manual_seed(seed), [], []
    for _ in range(steps):
        starts = torch.randint(0, len(text) - LENGTH - 1, (batch, 1), generator=generator)
        taken = text[starts + torch.arange(LENGTH + 1)]
        logits = model(taken[:, :-1])
        loss = functional.cross_entropy(logits.reshape(-1, 256), taken[:, 1:].reshape(-1))
        (loss + sum(block.experts.extra for block in model.blocks)).backward()
        optimizer.step()
        optimizer.zero_grad()
        for block in model.blocks:
            moeyard.update_selection_bias(block.experts.bias, block.experts.ids, rate=1e-3)
        losses.append(loss.item())
        ids = model.blocks[0].experts.ids
        shares.append(torch.bincount(ids.flatten().long(), minlength=EXPERTS) / ids.numel())
    return Run(losses, torch.stack(shares), [parameter.detach() for parameter in model.parameters()])


def plot(mine: Run, eager: Run, out: Path) -> None:
    """Both losses, and the shares of moeyard's run, into a PNG or SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    steps = range(1, len(mine.losses) + 1)
    left.plot(steps, eager.losses, label="eager", color="C0", linewidth=2.5, alpha=0.5)
    left.plot(steps, mine.losses, label="moeyard", color="C1", linewidth=0.8)
    left.set(xlabel="step", ylabel="loss, nats per byte")
    left.legend(fontsize="small")
    left.grid(alpha=0.3)
    right.stackplot(steps, mine.shares.T.numpy(), labels=[f"expert {i}" for i in range(EXPERTS)])
    right.set(xlabel="step", ylabel="share of routes, first layer", ylim=(0, 1))
    right.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"{EXPERTS} experts, top {TOP_K}, bytes of Python's manual, float32 on a CPU", fontsize="medium")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    pyplot.close(figure)


def main() -> None:
    """Trains twice and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("build/train_moe.svg"))
    arguments = parser.parse_args()
    mine, eager = train(arguments.steps), train(arguments.steps, eager=True)
    print(f"{'step':>6} {'moeyard':>9} {'eager':>9}")
    for step in sorted({*range(0, arguments.steps, 50), arguments.steps - 1}):
        print(f"{step + 1:6} {mine.losses[step]:9.4f} {eager.losses[step]:9.4f}")
    plot(mine, eager, arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
