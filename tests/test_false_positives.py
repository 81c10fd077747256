"""The promise about false positives, on images that took no part in building the guard."""

from __future__ import annotations

import numpy as np
from scipy.stats import betabinom

from noisec.builders.attacks import noisy_clean


def highest_credible(calibration: int, alpha: float, count: int) -> int:
    """The number of false positives that an exact conformal test exceeds once in a thousand runs.

    The threshold is an order statistic of the calibration scores, so its true rate is Beta distributed and the number of false
    positives among ``count`` fresh exchangeable images is beta-binomial (Vovk 2012).
    """
    above = int(alpha * (calibration + 1))
    return int(betabinom(count, above, calibration + 1 - above).ppf(0.999))


def test_natural_images_stay_within_the_conformal_bound(client, spec, report):
    images = noisy_clean(report, spec.natural_noise_sd, seed=99)
    verdicts = client.classify(images)
    assert verdicts.is_malicious.sum() <= highest_credible(spec.data.calibrate, spec.target_fpr, len(images))
    assert np.array_equal(verdicts.is_malicious, verdicts.p_values.astype(np.float64) <= spec.target_fpr)


def test_clean_images_are_flagged_about_as_often_as_promised(client, spec, report):
    flagged = client.classify(report.pixels).is_malicious[:2000].mean()
    assert 0.003 <= flagged <= 0.02
