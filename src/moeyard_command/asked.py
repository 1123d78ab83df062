"""What `moeyard explain` is asked about: text of the command line -> what `moeyard.explain` takes. It imports torch."""

from dataclasses import replace
from typing import Any

import torch

from moeyard.bench import served
from moeyard.dispatch.call import Call
from moeyard.quant import CODES, scheme_of
from moeyard.values import ExpertWeights


def place_of(name: str) -> torch.device:
    """The device of --device, which need not be there."""
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu or cuda, got {name!r}")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: expected cpu or cuda, got {name!r}") from None


def dtype_of(name: str) -> torch.dtype | None:
    """The dtype of --dtype; None unless given."""
    found = getattr(torch, name, None) if name else None
    if name and not isinstance(found, torch.dtype):
        raise ValueError(f"--dtype: expected a dtype of torch, such as bfloat16, got {name!r}")
    return found


def capability_of(text: str) -> tuple[int, int] | None:
    """(major, minor) of --capability; None unless given."""
    if not text:
        return None
    major, dot, minor = text.partition(".")
    if not (major.isdecimal() and dot and minor.isdecimal()):
        raise ValueError(f"--capability: expected MAJOR.MINOR, such as 9.0, got {text!r}")
    return int(major), int(minor)


def sizes_of(model: str, tokens: int | None, scheme: str) -> dict[str, Any]:
    """The arguments of `moeyard.explain` that say how large a call of a model's experts is."""
    if not model:
        if tokens is not None or scheme:
            raise ValueError("--model: expected a model beside --tokens and --scheme, got none")
        return {}
    layer = served.served(model)
    weights = _quantised(layer.weights, scheme) if scheme else layer.weights
    return {"num_tokens": tokens, "top_k": layer.router["top_k"], "weights": weights}


def _quantised(weights: ExpertWeights, words: str) -> ExpertWeights:
    """Weights of a scheme: what a choice depends on, without scales."""
    scheme = scheme_of(words)
    code = CODES[scheme.weights]
    w13, w2 = (
        torch.empty(*matrix.shape[:2], matrix.shape[2] // code.per_byte, dtype=code.dtype, device="meta")
        for matrix in (weights.w13, weights.w2)
    )
    return replace(weights, w13=w13, w2=w2, scheme=scheme)


def is_guess(call: Call) -> bool:
    """Whether a choice may depend on a GPU that is not there to be asked."""
    return call.device.type == "cuda" and call.capability is None and not torch.cuda.is_available()
