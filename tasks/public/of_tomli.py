"""What is timed of tomli: documents of three kinds are read. What is no number, text, list or dict becomes a text."""

import tomli


def documents(text):
    return _plain(tomli.loads(text))


strings = comments = documents


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | int | float) else str(value)
