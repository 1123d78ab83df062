"""Names that a module imports and that are not driven here."""


def per_token_group_quant_int8(*arguments: object, **options: object) -> None:
    """Raises NotImplementedError."""
    raise NotImplementedError


def per_token_quant_int8(*arguments: object, **options: object) -> None:
    """Raises NotImplementedError."""
    raise NotImplementedError
