"""Every operator is sound under any caller on a GPU too: the drawn questions of tests/test_callers.py, there.

MOEYARD_CALLERS_S, MOEYARD_CALLERS_SEED and MOEYARD_CALLERS_CASE are as there.
"""

import os

import pytest

from moeyard.testing import thresholds
from moeyard.testing.soundness import Range, check, check_for

ON_GPU = Range(device="cuda", most=1 << 24)
REPEAT = "python -m pytest tests/gpu/test_callers_gpu.py"


@pytest.mark.filterwarnings("ignore:.* takes the call")  # weights lie anywhere here
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # torch's own words where a thread begins with `linear`
def test_drawn_questions() -> None:
    seed, case = int(os.environ.get("MOEYARD_CALLERS_SEED", "0")), os.environ.get("MOEYARD_CALLERS_CASE")
    if case is not None:
        print(check(seed, int(case), thresholds.collect(), ON_GPU))
        return
    print(check_for(float(os.environ.get("MOEYARD_CALLERS_S", "60")), seed, ON_GPU, REPEAT), "questions")
