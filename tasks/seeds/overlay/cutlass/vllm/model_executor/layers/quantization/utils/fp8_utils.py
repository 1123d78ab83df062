"""A name that a module imports and that is not driven here."""


def per_token_group_quant_fp8(*arguments: object, **options: object) -> None:
    """Raises NotImplementedError."""
    raise NotImplementedError
