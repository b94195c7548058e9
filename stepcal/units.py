"""Units and array types that all rooms share: a constant ``A_PER_B`` is how many A make one B."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

MS_PER_S = 1e3
US_PER_S = 1e6
US_PER_MS = 1e3
NS_PER_US = 1e3
NS_PER_S = 1e9
PERCENT = 100.0
"""Percent in a whole."""
BYTES_PER_GIB = 1 << 30
BYTES_PER_MB = 1e6
