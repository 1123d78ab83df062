"""The largest value of float4 e2m1, which a part of the module that is not driven here reads."""


class scalar_types:  # noqa: N801 - vLLM's name
    """Types by name."""

    class float4_e2m1f:  # noqa: N801 - vLLM's name
        """float4 e2m1."""

        @staticmethod
        def max() -> float:
            """Its largest value."""
            return 6.0
