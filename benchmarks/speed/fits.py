"""How a snapshot's time grows: a power of the size, and microseconds for each tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

# Fewer points have no error.
FEWEST = 3


class Fit(NamedTuple):
    """What was fitted, and its standard error."""

    value: float
    error: float

    def text(self) -> str:
        """As it is printed: value and error to as many digits as make sense.

        >>> Fit(0.98765, 0.0123).text(), Fit(12.34, 0.5).text()
        ('0.99 ± 0.01', '12.3 ± 0.5')
        """
        digits = 2 if abs(self.value) < 10 else 1
        return f"{self.value:.{digits}f} ± {self.error:.{digits}f}"


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> Fit | None:
    """The p of ``seconds = c sizes^p``: least squares of the logarithms.

    Returns:
      None for fewer than three points.

    >>> exponent([1, 10, 100], [2.0, 20.0, 200.0]).text()
    '1.00 ± 0.00'
    """
    if len(sizes) < FEWEST:
        return None
    line = stats.linregress(np.log(sizes), np.log(seconds))
    # Of equal seconds, scipy gives no error.
    return Fit(float(line.slope), float(np.nan_to_num(line.stderr)))


def per_tensor(counts: Sequence[float], seconds: Sequence[float]) -> Fit | None:
    """The b [us] of ``seconds = a + b counts``.

    Least squares of relative residuals, as the noise is a share of what is measured: the many
    tensors do not drown the few.

    >>> per_tensor([10, 100, 1000], [1e-3 + 5e-6 * n for n in (10, 100, 1000)]).text()
    '5.00 ± 0.00'
    """
    if len(counts) < FEWEST:
        return None
    x, y = np.asarray(counts, float), np.asarray(seconds, float)
    # a / y + b x / y = 1, in units of the largest.
    x_most, y_most = x.max(), y.max()
    columns = np.stack([y_most / y, (x / x_most) * (y_most / y)], axis=1)
    found = np.linalg.lstsq(columns, np.ones_like(y), rcond=None)[0]
    residuals = columns @ found - 1
    variance = residuals @ residuals / (len(x) - 2)
    error = np.sqrt(variance * np.linalg.inv(columns.T @ columns)[1, 1])
    scale = 1e6 * y_most / x_most
    return Fit(float(found[1] * scale), float(error * scale))
