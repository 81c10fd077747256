"""The denoiser study changes the denoiser and nothing else, and its tables say which is which."""

from __future__ import annotations

from noisec.benchmarks.detection.denoisers import COMPARED, DENOISERS, Row, as_markdown, variants


def test_only_the_denoiser_differs(spec):
    made = variants(spec, 2)
    assert list(made) == list(DENOISERS)
    assert len({variant.autoencoder.model_dump_json() for variant in made.values()}) == len(DENOISERS)
    for variant in made.values():
        assert variant.autoencoder.epochs == 2
        assert variant.model_copy(update={"autoencoder": spec.autoencoder, "compare": spec.compare}) == spec
    published = made["bottleneck, noise as published"].autoencoder
    assert (published.network, published.noise_sd, published.guidance) == ("bottleneck", 0.5, 0)


def test_every_cell_is_in_its_table():
    told = {"noise_sd": 0.15, "epochs": 2, "fpr": 0.01, "fpr_natural_noise": 0.02, "n_benign": 200, "n_malicious": 80}
    rows = [
        Row(denoiser=name, guidance=0.0, residual=0.03, detector=detector, attack=attack, auroc=auroc, tpr_at_1pct=0.5, **told)
        for name, auroc in (("bottleneck", 0.61), ("U-Net", 0.97))
        for detector in COMPARED
        for attack in ("fgsm-0.1", "pgd-0.02")
    ]
    rows[-1] = Row(
        denoiser="U-Net", guidance=0.0, residual=0.03, detector=COMPARED[-1], attack="pgd-0.02", auroc=None, tpr_at_1pct=None, **told
    )
    text = as_markdown(rows, "mine", "noisec bench denoisers")
    assert text.count("0.610 / 50.0 %") == 2 * len(COMPARED)
    assert text.count("0.970 / 50.0 %") == 2 * len(COMPARED) - 1
    assert all(f"## {detector}" in text for detector in COMPARED)
    assert "| - |" in text
