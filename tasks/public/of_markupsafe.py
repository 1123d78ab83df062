"""What is timed of MarkupSafe: texts are escaped, and tags are stripped."""

from markupsafe import Markup, escape


def escaped(texts, times):
    for _ in range(times):
        found = [escape(text) for text in texts]
    return [str(one) for one in found], [type(one).__name__ for one in found]


def stripped(texts, times):
    marked = [Markup(text) for text in texts]  # noqa: S704 - it is what is timed
    for _ in range(times):
        found = [one.striptags() for one in marked]
    return found
