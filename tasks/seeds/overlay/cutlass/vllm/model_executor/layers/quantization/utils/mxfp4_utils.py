"""A name that a module imports and that is not driven here."""


def quant_dequant_mxfp4(*arguments: object, **options: object) -> None:
    """Raises NotImplementedError."""
    raise NotImplementedError
