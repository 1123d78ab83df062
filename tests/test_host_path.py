"""What eager calls do on the host before the driver starts their launches, on a GPU that is not there."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import moeyard
from moeyard import ExpertWeights, Layout, Routing
from moeyard.dispatch.again import Repeats
from moeyard.dispatch.op import Op
from moeyard.testing import draw_weights
from moeyard.testing.stand_in import Driver, Started, calls_of, pretended_gpu

HIDDEN, SIZE, EXPERTS, TOP_K = 64, 64, 128, 8
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="pretends a GPU, and one is there")


@pytest.fixture
def driver() -> Iterator[Driver]:
    pytest.importorskip("cuda.bindings")
    with pretended_gpu() as driver:
        driver.started = []
        yield driver


@cache
def drawn(dtype: torch.dtype, full: bool) -> ExpertWeights:
    return draw_weights(EXPERTS, HIDDEN, SIZE, dtype, bias=full)


class Layer:
    """Tensors of a call: every one has its own memory, but all layers share their weights."""

    def __init__(self, tokens: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16, full: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
        self.logits = torch.randn(tokens, EXPERTS, generator=generator).to(dtype)
        self.router = torch.randn(EXPERTS, HIDDEN, generator=generator).to(dtype)
        self.weights = drawn(dtype, full)
        self.ids = torch.randint(0, EXPERTS, (tokens, TOP_K), generator=generator, dtype=torch.int32)
        self.factors = torch.rand(tokens, TOP_K, generator=generator)
        self.bias = torch.rand(EXPERTS) if full else None
        self.padding = torch.zeros(tokens, dtype=torch.bool) if full else None
        self.map = torch.arange(EXPERTS, dtype=torch.int32) if full else None

    @property
    def routing(self) -> Routing:
        return Routing(self.factors, self.ids)

    @property
    def named(self) -> dict[str, torch.Tensor]:
        weights = self.weights
        given = {
            "hidden": self.hidden, "logits": self.logits, "router": self.router, "ids": self.ids, "map": self.map,
            "factors": self.factors, "bias": self.bias, "padding": self.padding, "w13": weights.w13, "w2": weights.w2,
            "w13_bias": weights.w13_bias, "w2_bias": weights.w2_bias,
        }  # fmt: skip
        return {name: tensor for name, tensor in given.items() if tensor is not None}


def route(x: Layer, **given: Any) -> Any:
    options: dict[str, Any] = {"top_k": TOP_K, "selection_bias": x.bias, "is_padding": x.padding, "scoring": "sigmoid"}
    return moeyard.route(x.logits, **(options | given))


def align(x: Layer, **given: Any) -> Any:
    options: dict[str, Any] = {"num_experts": EXPERTS, "block_size": 16, "expert_map": x.map}
    return moeyard.moe_align_block_size(x.ids, **(options | given))


def both(x: Layer, **given: Any) -> Any:
    options: dict[str, Any] = {"top_k": TOP_K, "selection_bias": x.bias, "is_padding": x.padding, "scoring": "sigmoid"}
    return moeyard.route_and_align(x.logits, **({"block_size": 16, "expert_map": x.map} | options | given))


def experts(x: Layer, **given: Any) -> Any:
    return moeyard.fused_experts(x.hidden, x.routing, x.weights, **({"expert_map": x.map} | given))


def layer(x: Layer, **given: Any) -> Any:
    options: dict[str, Any] = {"top_k": TOP_K, "selection_bias": x.bias, "is_padding": x.padding, "scoring": "sigmoid"}
    return moeyard.moe_layer(x.hidden, x.router, x.weights, **(options | given))


CALLS: dict[str, Callable[..., Any]] = {
    "route": route, "align": align, "route_and_align": both, "fused_experts": experts, "moe_layer": layer,
}  # fmt: skip


def tensors_of(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, Routing):
        return [result.topk_weights, result.topk_ids]
    if isinstance(result, Layout):
        return list(result.tensors)
    return [tensor for part in result for tensor in tensors_of(part)]


def told(started: list[Started], x: Layer, result: Any) -> list[Any]:
    """Launches with names for what lies in tensors that are known, and places in what is left: the call's own memory.

    Small numbers are sizes. Memory is known by its first address in a launch.
    """
    known = {name: (t.data_ptr(), t.nbytes) for name, t in x.named.items()}
    known |= {f"out {i}": (t.data_ptr(), t.nbytes) for i, t in enumerate(tensors_of(result))}
    words = {word for one in started for word in one.words if word > 1 << 32}
    inside = {word: name for word in words for name, (at, size) in known.items() if at <= word < at + max(size, 1)}
    own = sorted(words - inside.keys())

    def say(word: int) -> Any:
        if word in inside:
            return inside[word], word - known[inside[word]][0]
        return ("memory", word - own[0]) if word in words else word

    return [(one.name, one.grid, one.shared_bytes, one.stream, tuple(map(say, one.words))) for one in started]


@pytest.mark.parametrize("full", [False, True], ids=["bare", "full"])
@pytest.mark.parametrize("tokens", [1, 40, 700])
@pytest.mark.parametrize("name", CALLS)
def test_a_repeated_call_starts_what_a_first_one_does(name: str, tokens: int, full: bool, driver: Driver) -> None:
    """Of other tensors, too, whose places alone differ."""
    found = []
    for seed in (0, 0, 1):
        x = Layer(tokens, seed, full=full)
        driver.started = []
        result = CALLS[name](x)
        if name == "moe_layer":
            found.append([one._replace(maps=(), words=()) for one in driver.started])
        else:
            found.append(told(driver.started, x, result))
    assert found[0] and found[0] == found[1] == found[2]


MOST_FUNCTIONS = {"route": 9, "align": 10, "route_and_align": 14, "fused_experts": 13, "moe_layer": 24}
"""That a repeated call enters: what it costs on a host, in a number that does not depend on the machine."""
MOST_IN_C = {"route": 12, "align": 12, "route_and_align": 22, "fused_experts": 26, "moe_layer": 42}


@pytest.mark.parametrize("tokens", [1, 64, 1024])
@pytest.mark.parametrize("name", CALLS)
def test_a_repeated_call_enters_so_many_functions(name: str, tokens: int, driver: Driver) -> None:
    driver.started = None
    x = Layer(tokens)
    first, *more = (calls_of(lambda: CALLS[name](x)) for _ in range(8))
    again = min(more)  # where memory came back to a place whose map is known
    assert again[0] <= MOST_FUNCTIONS[name] < first[0]
    assert again[1] <= MOST_IN_C[name], "functions in C"


def test_counting_sees_functions() -> None:
    assert calls_of(lambda: None) == (0, 0)
    own, in_c = calls_of(lambda: moeyard.Activation("gelu"))
    assert own >= 1 and in_c > 3, "what a dataclass checks of itself"


BAD: dict[str, list[dict[str, Any]]] = {
    "route": [
        {"top_k": 8.0}, {"top_k": True}, {"top_k": [8]}, {"renormalize": 0}, {"num_groups": 1.0}, {"scoring": "other"},
        {"routed_scaling_factor": True}, {"routed_scaling_factor": float("nan")}, {"batch_invariant": 0},
        {"impl": "other"}, {"impl": []}, {"selection_bias": torch.zeros(3)}, {"is_padding": [False]},
    ],
    "align": [
        {"num_experts": 128.0}, {"block_size": 16.0}, {"block_size": True}, {"block_size": []}, {"top_k": 7},
        {"num_local_experts": 128.0}, {"expert_map": torch.zeros(3, dtype=torch.int32)}, {"impl": "other"},
        {"expert_map": torch.zeros(EXPERTS)}, {"expert_map": [0]},
    ],
    "route_and_align": [
        {"block_size": 16.0}, {"top_k": 8.0}, {"renormalize": 0}, {"num_local_experts": True}, {"impl": "other"},
        {"other": 1}, {"selection_bias": torch.zeros(3)}, {"expert_map": torch.zeros(EXPERTS)}, {"batch_invariant": 1},
    ],
    "fused_experts": [
        {"num_experts": 128.0}, {"num_experts": 0}, {"apply_router_weight_on_input": 0}, {"save": "other"},
        {"save": []}, {"batch_invariant": 0}, {"activation": "silu"}, {"activation": []}, {"impl": "other"},
        {"expert_map": torch.zeros(EXPERTS)}, {"expert_map": 1}, {"out": torch.zeros(3, HIDDEN).bfloat16()},
        {"out": torch.zeros(40, HIDDEN)}, {"out": torch.zeros(HIDDEN, 40).bfloat16().t()}, {"out": 1},
    ],
    "moe_layer": [
        {"top_k": 8.0}, {"save": "other"}, {"activation": 1}, {"impl": "other"}, {"other": 1}, {"batch_invariant": 0},
        {"router_bias": torch.zeros(EXPERTS)}, {"shared_gate": torch.zeros(1, HIDDEN).bfloat16()}, {"shared": 1},
        {"selection_bias": torch.zeros(3)},
    ],
}  # fmt: skip
CHANGES: dict[str, Callable[[Layer], Any]] = {
    "hidden of a list": lambda x: setattr(x, "hidden", [1.0]),
    "wider hidden": lambda x: setattr(x, "hidden", x.hidden.float()),
    "fewer columns": lambda x: setattr(x, "hidden", x.hidden[:, 1:]),
    "fewer tokens": lambda x: setattr(x, "hidden", x.hidden[1:]),
    "wide factors": lambda x: setattr(x, "factors", x.factors.double()),
    "fewer factors": lambda x: setattr(x, "factors", x.factors[:, 1:]),
    "no factors": lambda x: setattr(x, "factors", None),
    "floating ids": lambda x: setattr(x, "ids", x.ids.float()),
    "ids of a list": lambda x: setattr(x, "ids", [[1]]),
    "ids of three dimensions": lambda x: setattr(x, "ids", x.ids[None]),
    "logits of integers": lambda x: setattr(x, "logits", x.logits.int()),
    "logits in one row": lambda x: setattr(x, "logits", x.logits[0]),
    "no weights": lambda x: setattr(x, "weights", None),
    "weights of another dtype": lambda x: setattr(x, "weights", Layer(1, dtype=torch.float16).weights),
    "w2 of another size": lambda x: setattr(x, "weights", ExpertWeights(x.weights.w13, x.weights.w2[:, 1:])),
    "no w2": lambda x: setattr(x, "weights", ExpertWeights(x.weights.w13, None)),  # type: ignore[arg-type]
    "a short bias": lambda x: setattr(x, "weights", ExpertWeights(x.weights.w13, x.weights.w2, x.weights.w13[:, 0])),
    "another router": lambda x: setattr(x, "router", x.router[1:]),
}


def outcome(call: Callable[[], Any]) -> str:
    try:
        call()
    except (TypeError, ValueError, AttributeError) as problem:
        return f"{type(problem).__name__}: {problem}"
    return "an answer"


@pytest.mark.parametrize("name", CALLS)
def test_what_a_first_call_refuses_a_repeated_one_refuses(name: str) -> None:
    """In the same words, whatever was called before: values that Python takes for equal, other tensors, no tensors."""
    pytest.importorskip("cuda.bindings")
    cases = [(Layer(40), given) for given in BAD[name]]
    for change in CHANGES.values():
        cases.append((Layer(40), {}))
        change(cases[-1][0])
    with pretended_gpu():
        cold = [outcome(lambda: CALLS[name](x, **given)) for x, given in cases]  # noqa: B023
    with pretended_gpu():
        fine, warm = Layer(40), []
        for x, given in cases:
            for _ in range(2):
                CALLS[name](fine)
            warm.append(outcome(lambda: CALLS[name](x, **given)))  # noqa: B023
    assert cold == warm
    assert all(one != "an answer" for one in cold[: len(BAD[name])]), cold


def test_what_has_to_see_calls_sees_repeated_ones(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modes, transforms, tangents, lazy views, subclasses, gradients: such calls take the registered way."""
    x, seen = Layer(40), []
    monkeypatch.setattr(Op, "_through_dispatcher", lambda op, *_: seen.append(op.name))
    names = {"route": "logits", "align": "ids", "fused_experts": "hidden"}
    for name in names:
        for _ in range(2):
            CALLS[name](x)
    assert not seen

    class Kind(torch.Tensor):
        pass

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    class Dispatches(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    def ask(expected: int = 1) -> None:
        for name in names:
            seen.clear()
            CALLS[name](x)
            assert len(seen) == expected, name

    for mode in (Dispatches(), Functions(), forward_ad.dual_level()):
        with mode:
            ask()
    torch.func.vmap(lambda one: (ask(), one)[1])(torch.zeros(2))
    ask(0)
    plain = {place: getattr(x, place) for place in names.values()}
    for change in (lambda t: t.as_subclass(Kind), torch._neg_view):
        for place, tensor in plain.items():
            setattr(x, place, change(tensor))  # type: ignore[operator]
        ask()
    for place, tensor in plain.items():
        setattr(x, place, tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor)
    del names["align"]
    for _ in range(2):
        for name in names:
            seen.clear()
            with torch.no_grad():
                CALLS[name](x, **({"save": "inputs"} if name == "fused_experts" else {}))
            assert not seen
            CALLS[name](x, **({"save": "inputs"} if name == "fused_experts" else {}))
            assert len(seen) == 1


def test_outputs_that_exist_are_written_and_watched(driver: Driver) -> None:
    x = Layer(40)
    workspace = torch.zeros(2, 40, HIDDEN).bfloat16()
    out = workspace[0]
    for count in range(1, 4):
        assert experts(x, out=out) is out and out._version == count
    x.hidden = workspace[1]
    for _ in range(2):
        experts(x, out=out)
    for place in (0, 1):
        x.hidden = workspace.view(-1)[place * 8 :][: 40 * HIDDEN].view(40, HIDDEN)
        with pytest.raises(ValueError, match="out: expected memory apart from hidden_states"):
            experts(x, out=out)


def test_memory_that_moves_is_followed(driver: Driver) -> None:
    """Weights that get other memory, as `.data` and a move of a module give them; ids that begin anywhere."""
    x = Layer(40)
    for _ in range(2):
        experts(x, impl="cuda")
    x.weights = ExpertWeights(x.weights.w13.clone(), x.weights.w2.clone())
    for tensor in (x.weights.w13, x.weights.w2):
        tensor.data = tensor.data.clone()
    driver.started = []
    moved = told(driver.started, x, experts(x, impl="cuda"))
    driver.started = []
    x = Layer(40)
    x.weights = ExpertWeights(x.weights.w13.clone(), x.weights.w2.clone())
    assert told(driver.started, x, experts(x, impl="cuda")) == moved
    x.ids = torch.zeros(41 * TOP_K, dtype=torch.int32)[1 : 1 + 40 * TOP_K].view(40, TOP_K)
    for _ in range(2):
        driver.started = []
        experts(x, impl="cuda")
        assert driver.started[0].words[0] == x.ids.data_ptr()
    x.weights.w13.data = x.weights.w13.data.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match=r"weights.w13: expected a contiguous tensor"):
        experts(x, impl="cuda")


def test_other_settings_are_followed(driver: Driver) -> None:
    from moeyard.cuda.runtime.launch import programmatic_launch

    x = Layer(40)
    names = ("route", "align", "route_and_align")
    try:
        for setting in (False, True, False):
            programmatic_launch(setting)
            for name in names * 2:
                before = len(driver.recipes)
                CALLS[name](x)
                assert len(driver.recipes) == before or driver.recipes[-1].programmatic is setting
    finally:
        programmatic_launch(False)
    assert {recipe.programmatic for recipe in driver.recipes} == {False, True}


@pytest.mark.parametrize("name", CALLS)
def test_what_repeats_a_call_keeps_no_tensor(name: str, driver: Driver) -> None:
    driver.started, x = None, Layer(40, full=True)
    for _ in range(3):
        result = CALLS[name](x)
    shared = {id(tensor) for tensor in (x.weights.w13, x.weights.w2, x.weights.w13_bias, x.weights.w2_bias)}
    left = [weakref.ref(tensor) for tensor in (*x.named.values(), *tensors_of(result)) if id(tensor) not in shared]
    del x, result
    gc.collect()
    assert len(left) > 7 and not any(one() is not None for one in left)


@pytest.mark.parametrize("name", ["route", "fused_experts"])
def test_a_thread_without_a_context_gets_one_and_a_refusal_is_an_error(
    name: str, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cuda.bindings.driver import CUresult

    from moeyard.cuda.runtime import launch

    given: list[int] = []
    monkeypatch.setattr(launch, "give_context", given.append)
    x, lost = Layer(40), CUresult.CUDA_ERROR_INVALID_CONTEXT
    for _ in range(2):
        driver.refusals, before = [lost], driver.launches
        CALLS[name](x)
        assert driver.launches - before == (1 if name == "route" else 4)
        for refusals, words in (([lost, lost], lost.name), ([CUresult.CUDA_ERROR_INVALID_VALUE], "INVALID_VALUE")):
            driver.refusals = refusals
            with pytest.raises(RuntimeError, match=rf"launch of \w+: .*{words}, with \(\d+, \d+, \d+\)"):
                CALLS[name](x)
    assert given == [0] * 4


def test_threads_have_memory_of_their_own(driver: Driver) -> None:
    """What the driver reads does not change under it, while others call with other tensors."""
    layers = [Layer(tokens, seed) for seed, tokens in enumerate((1, 1, 40, 40))]
    for x in layers:
        experts(x)
    start, driver.pause_s = threading.Barrier(len(layers)), 0.0005
    with ThreadPoolExecutor(len(layers)) as pool:
        done = pool.map(lambda x: (start.wait(), [experts(x) for _ in range(10)]), layers)
        assert len(list(done)) == len(layers) and not driver.changed


def test_a_full_memory_of_calls_forgets_the_oldest() -> None:
    repeats, tensors = Repeats(most=3), [torch.zeros(3)]
    for key in range(5):
        repeats.add(((key,), tensors), lambda key=key: lambda: key)  # type: ignore[misc]
        assert len(repeats) == min(key + 1, 3)
    assert [repeats.repeated(((key,), tensors)) for key in range(5)] == [None, None, 2, 3, 4]
    asked: list[int] = []
    for _ in range(3):
        repeats.add((("none",), tensors), lambda: asked.append(1))  # type: ignore[func-returns-value]
    assert len(asked) == 1, "what has nothing is asked once"
    assert repeats.repeated(((4,), [torch.zeros(4)])) is None and repeats.repeated(((4,), [[0.0]])) is None
