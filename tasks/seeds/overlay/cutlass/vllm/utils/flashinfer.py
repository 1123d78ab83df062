"""A name that a module imports and that is not driven here."""


def fp4_quantize(*arguments: object, **options: object) -> None:
    """Raises NotImplementedError."""
    raise NotImplementedError
