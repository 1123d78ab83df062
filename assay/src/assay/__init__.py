"""The judge of performance claims: estimates, exact intervals and verdicts from paired measurements."""

from assay.statistics.looks import LOOKS, Judgement, Look, judge
from assay.statistics.signed_rank import Interval, exact_interval, hodges_lehmann, p_value

__all__ = ["LOOKS", "Interval", "Judgement", "Look", "exact_interval", "hodges_lehmann", "judge", "p_value"]
__version__ = "0.1.0"
