"""The judge of performance claims: estimates, exact intervals and verdicts from paired measurements."""

from assay.stats import LOOKS, Interval, Judgement, Look, exact_interval, hodges_lehmann, judge, p_value

__all__ = ["LOOKS", "Interval", "Judgement", "Look", "exact_interval", "hodges_lehmann", "judge", "p_value"]
__version__ = "0.1.0"
