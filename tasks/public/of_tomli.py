"""What is timed of tomli: documents of three kinds are read, several times over. Other values become texts."""

import tomli


def documents(text, times):
    for _ in range(times):
        found = tomli.loads(text)
    return _plain(found)


strings = comments = documents


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | int | float) else str(value)
