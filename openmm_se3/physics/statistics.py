"""Means and slopes of correlated time series, with honest standard errors."""

from collections.abc import Sequence

import numpy as np


def statistical_inefficiency(values: np.ndarray) -> float:
    """How many successive samples carry the information of one independent sample, at least 1.

    One plus twice the sum of the normalised autocorrelation up to its first zero, weighted by the share of pairs there are
    (Chodera et al., J. Chem. Theory Comput. 3, 26 (2007)).

    Parameters
    ----------
    values : ndarray
        ``(n,)``, equally spaced in time.
    """
    d = values - values.mean()
    variance = float(d @ d) / len(d)
    # A constant series fluctuates by rounding only.
    if variance <= (1e-14 * max(abs(values).max(), 1e-300)) ** 2:
        return 1.0
    g = 1.0
    for lag in range(1, len(d) - 1):
        correlation = float(d[:-lag] @ d[lag:]) / ((len(d) - lag) * variance)
        if correlation <= 0:
            break
        g += 2 * correlation * (1 - lag / len(d))
    return g


def mean_with_error(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error; the error is infinite for fewer than two samples."""
    if len(values) < 2:
        return float(np.mean(values)), float("inf")
    return float(np.mean(values)), float(np.std(values, ddof=1) * np.sqrt(statistical_inefficiency(values) / len(values)))


def mean_of_independent(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error of two or more samples that know nothing of each other, such as those of several runs."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))


def slope_with_error(time: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Slope of the least-squares line and its standard error, from the correlated residuals.

    Parameters
    ----------
    time, values : ndarray
        ``(n,)``; NaN and an infinite error for fewer than four.
    """
    if len(time) < 4:
        return float("nan"), float("inf")
    slope, offset = np.polyfit(time, values, 1)
    residual = values - (slope * time + offset)
    spread = np.sqrt(np.sum((time - time.mean()) ** 2))
    scale = np.sqrt(np.sum(residual**2) / (len(time) - 2))
    return float(slope), float(scale / spread * np.sqrt(statistical_inefficiency(residual)))
