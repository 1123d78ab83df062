"""Which packages take part, and their versions."""

import importlib
import importlib.util
import warnings
from functools import cache
from importlib import metadata

import torch


@cache
def installed(package: str) -> bool:
    """Whether a package is there to be imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # not even its parent is
        return False


@cache
def peer_version(package: str) -> str:
    """The version of an importable peer; "" if it is not there or does not load."""
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError:
        return ""
    except Exception as problem:  # a library of it that is missing, a compiler that is not found
        warnings.warn(f"{package} takes no part, it does not load: {problem}", stacklevel=2)
        return ""
    return str(getattr(module, "__version__", "unknown"))


def versions(device: torch.device) -> dict[str, str]:
    """Package -> version of what takes part on a device."""
    found: dict[str, str] = {"torch": str(torch.__version__)}
    if device.type == "cuda":
        found |= {package: peer_version(package) for package in ("vllm", "deep_gemm")}
    for package in ("numpy", "numba", "triton", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = ""
    return {name: version for name, version in found.items() if version}
