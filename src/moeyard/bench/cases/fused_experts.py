"""The experts of a named model, or of a layer of such sizes."""

import torch

import moeyard
from moeyard.bench import layers, quantised, vllm_peer
from moeyard.bench.layer_peers import grouped_experts, transformers_experts
from moeyard.bench.layers import activation
from moeyard.bench.operators import Case, Operator, Provider, Run, able
from moeyard.bench.peers import peer_version
from moeyard.testing import plain_experts


def providers(case: Case, device: torch.device) -> list[Provider]:
    """moeyard, torch, on a GPU vLLM, on a CPU the class of the model in transformers; of quantised experts moeyard, and
    on a GPU vLLM where it has the scheme.
    """
    scheme = quantised.scheme_of_case(case)
    if scheme is not None:
        weights = quantised.as_kernels_read(layers.weights_of_case(case, device))
        able_to = able(case.op, case, device, weights)
        found = [Provider("moeyard", impl, _moeyard(case, impl)) for impl in able_to]
        run = vllm_peer.quantised_experts(scheme) if device.type == "cuda" and peer_version("vllm") else None
        return found if run is None else [*found, Provider("vllm", peer_version("vllm"), run)]
    found = [Provider("moeyard", impl, _moeyard(case, impl)) for impl in able(case.op, case, device)]
    act, on_gpu = activation(case), device.type == "cuda"
    if on_gpu and case["dtype"] == "bfloat16":
        found.append(Provider("torch", "grouped_mm", grouped_experts(act)))
    else:
        plain: Run = lambda x: plain_experts(x.hidden_states, x.routing, x.weights, act)  # noqa: E731
        found.append(Provider("torch", "plain", plain, waits=True))
    if on_gpu and peer_version("vllm"):
        found.append(Provider("vllm", peer_version("vllm"), vllm_peer.experts(act)))
    if not on_gpu:
        found += transformers_experts(case)
    return found


OPERATOR = Operator(
    layers.SIZES,
    layers.draw_layer,
    providers,
    layers.error,
    layers.bytes_moved,
    operations=layers.operations,
    optional=("scheme",),
    sets=layers.draw_sets,
    calls=lambda case: layers.sets_and_calls(case)[1],
    bytes_of=layers.bytes_of,
    beside=layers.beside,
)


def _moeyard(case: Case, impl: str) -> Run:
    act = activation(case)

    def run(x: layers.LayerInputs) -> torch.Tensor:
        weights = quantised.as_kernels_read(x.weights)
        return moeyard.fused_experts(x.hidden_states, x.routing, weights, activation=act, impl=impl)

    return run
