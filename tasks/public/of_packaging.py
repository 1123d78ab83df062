"""What is timed of packaging: texts become requirements, names and versions, several times over."""

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


def requirements(texts, times):
    for _ in range(times):
        found = [Requirement(text) for text in texts]
    return [[str(one), one.name, sorted(one.extras), str(one.specifier), str(one.marker)] for one in found]


def names(texts, times):
    for _ in range(times):
        found = [canonicalize_name(text) for text in texts]
    return found


def versions(texts, times):
    for _ in range(times):
        found = [Version(text) for text in texts]
    order = sorted(range(len(found)), key=lambda i: (found[i], i))
    return [[str(one), one.public, one.is_prerelease, list(one.release)] for one in found], order
