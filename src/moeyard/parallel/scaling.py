"""What a layer over many GPUs ought to cost: bytes over rates, with every assumption a field.

    python -m moeyard.parallel.scaling      # the table of docs/notes/parallel.md

Nothing here is measured. `benchmarks/parallel.py` measures what these predictions are to be compared with.
"""

from typing import NamedTuple


class Machine(NamedTuple):
    """Rates of GPUs and their wires. The defaults are those that an H200 is taken to reach."""

    domain: int = 8
    """GPUs that NVLink joins."""
    nvlink_bytes_per_us: float = 390_000.0
    """Per GPU and direction, of 450 GB/s."""
    rdma_bytes_per_us: float = 50_000.0
    """Per GPU and direction, beyond the domain."""
    nvlink_latency_us: float = 3.0
    """From the end of a write to the flag that the peer sees."""
    rdma_latency_us: float = 12.0
    memory_bytes_per_us: float = 4_200_000.0
    """Of 4.8 TB/s."""
    flops_per_us: float = 600e6
    """Of bf16 products; fp8 ones take `fp8_flops_per_us`."""
    fp8_flops_per_us: float = 900e6
    layer_us: float = 12.0
    """Launches, layout, activation and sum of a layer, whatever its size."""
    busiest: float = 1.0
    """Load of the busiest rank over the mean: 1 is a perfect balance."""


class Layer(NamedTuple):
    """An experts' layer."""

    name: str
    experts: int
    top_k: int
    hidden: int
    size: int
    fp8: bool
    """Weights, and rows on their way out. Rows come back as bf16."""


LAYERS = (
    Layer("Qwen3-235B bf16", 128, 8, 4096, 1536, False),
    Layer("Qwen3-235B fp8", 128, 8, 4096, 1536, True),
    Layer("DeepSeek-V3 fp8", 256, 8, 7168, 2048, True),
)


class Prediction(NamedTuple):
    """Microseconds of one layer on one rank, if nothing overlaps."""

    dispatch_us: float
    experts_us: float
    combine_us: float
    alone_us: float
    """One GPU with all experts and the tokens of all ranks (whether or not they fit into it)."""

    @property
    def total_us(self) -> float:
        """All three, one after the other."""
        return self.dispatch_us + self.experts_us + self.combine_us

    @property
    def speedup(self) -> float:
        """Over one GPU at the same global batch."""
        return self.alone_us / self.total_us


def _reached(places: int, top_k: int) -> float:
    """The chance that a token has an expert at one of `places` equal places."""
    return 1 - (1 - 1 / places) ** top_k


def _wire_us(layer: Layer, gpus: int, tokens: int, row_bytes: float, machine: Machine, forward: bool) -> float:
    """Each token's row once to every rank with one of its experts; beyond the domain once per domain if `forward`."""
    near = min(gpus, machine.domain)
    rows = tokens * (near - 1) * _reached(gpus, layer.top_k)
    domains = -(-gpus // machine.domain)
    far = tokens * ((domains - 1) * _reached(domains, layer.top_k) if forward else
                    (gpus - near) * _reached(gpus, layer.top_k))  # fmt: skip
    passed_on = tokens * (gpus - near) * _reached(gpus, layer.top_k) if forward else 0.0
    by_nvlink = (rows + passed_on) * row_bytes / machine.nvlink_bytes_per_us
    if gpus == 1:
        return 0.0
    if domains == 1:
        return by_nvlink + machine.nvlink_latency_us
    return max(by_nvlink, far * row_bytes / machine.rdma_bytes_per_us) + machine.rdma_latency_us


def _experts_us(layer: Layer, gpus: int, all_tokens: int, machine: Machine) -> float:
    held = max(1.0, layer.experts / gpus)  # of more GPUs than experts each has a replica
    hit = held * _reached(max(layer.experts, gpus), layer.top_k * all_tokens)
    weights = hit * 3 * layer.hidden * layer.size * (1 if layer.fp8 else 2)
    flops = 6.0 * layer.hidden * layer.size * layer.top_k * all_tokens / gpus
    rate = machine.fp8_flops_per_us if layer.fp8 else machine.flops_per_us
    return machine.busiest * max(weights / machine.memory_bytes_per_us, flops / rate) + machine.layer_us


def predict(
    layer: Layer, gpus: int, tokens: int, machine: Machine | None = None, *, forward: bool = False
) -> Prediction:
    """The cost of a layer over `gpus` GPUs with `tokens` tokens on each.

    Args:
        layer: sizes.
        gpus: ranks, one share of the experts each; beyond the number of experts one replica each.
        tokens: of each rank.
        machine: rates; those of the defaults unless given.
        forward: whether a row crosses to a domain once, to a rank that passes it on over NVLink.

    Tokens choose experts evenly and independently. Wires and memory do not disturb each other. What one rank sends is
    what it receives.
    """
    machine = machine or Machine()
    sent = layer.hidden * (1 + 4 / 128 if layer.fp8 else 2.0) + 8 * layer.top_k
    return Prediction(
        _wire_us(layer, gpus, tokens, sent, machine, forward),
        _experts_us(layer, gpus, tokens * gpus, machine),
        _wire_us(layer, gpus, tokens, 2.0 * layer.hidden, machine, forward),
        _experts_us(layer, 1, tokens * gpus, machine._replace(busiest=1.0)),
    )


def table(machine: Machine | None = None) -> str:
    """A Markdown table of predictions: 2 to 512 GPUs, 64 and 4096 tokens per GPU; times in microseconds."""
    lines = [
        "| layer | tokens per GPU | GPUs | dispatch | experts | combine | total | over one GPU | once per domain |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for layer in LAYERS:
        for tokens in (64, 4096):
            for gpus in (2, 4, 8, 64, 512):
                got = predict(layer, gpus, tokens, machine)
                cells = (got.dispatch_us, got.experts_us, got.combine_us, got.total_us)
                times = " | ".join(f"{time:.0f}" for time in cells)
                once = predict(layer, gpus, tokens, machine, forward=True).total_us
                lines.append(
                    f"| {layer.name} | {tokens} | {gpus} | {times} | {got.speedup:.1f} x | {once:.0f} |"
                )  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    print(table())


if __name__ == "__main__":
    main()
