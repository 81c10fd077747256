"""The card of a guard: what it is and what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from noisec.builders.attacks import SQUARE_QUERIES
from noisec.builders.figures import PrecisionTable, figure_rows, markdown_table, percent, precision_rows
from noisec.builders.repository import Widths
from noisec.builders.spec import BLOCK_SHARE, GuardSpec

CARD = """# {name}, release {release}

Protects the classifier `{classifier}` ({source}, {classes}). Ask `{name}` for `LOGITS`, `SCORE`, `P_VALUE`, `IS_MALICIOUS`,
`RELEASE`; the input `IMAGE` is {image}.

## Measured
On {n} held-out images, attacks on the classifier (L-infinity, epsilon in the name; FGSM and PGD
with its gradients, Square with {queries} of its answers), exported stages in process.
Nominal false-positive rate {alpha}; AUROC and TPR are against clean images; "flagged" is the guard's own verdict at its calibrated
threshold; every attacked image counts. "Attack success" counts every wrong label, the classifier's own errors included; "missed" is the
share of attacks that succeeded and were not flagged.

{table}

## Precisions
{precisions}

Against fp32 in the same runtime, and in the runtime `tensorrt` of a recalibrated release against its own graphs in ONNX Runtime; AUROC and
TPR at 1 % FPR are means over the attacks above, each with mixtures fitted on its own stages' answers. Build seconds are those of lowering
or compiling the two stages.

## Limits
An attacker who holds the guard's own weights is not among these attacks, and is not stopped.

## Made of
{audit}- autoencoder: `{autoencoder}`, trained on {train} clean images with noise of sd 0 to {noise_sd}{patches}{guided}{blocks}
- detectors: {detectors}, fitted on {fit} clean images and calibrated on {calibrate} others,
  half of them with sensor noise of sd 0 to {natural}
{hardened}{memory}- {levels} noise level(s), runtime `{runtime}`, precision `{precision}`, seed {seed}

`{release}/manifest.json` holds all figures, versions and the SHA-256 of every file.
"""


def write_card(
    repository: Path,
    spec: GuardSpec,
    classifier: str,
    widths: Widths,
    measured: dict[str, Any],
    precisions: PrecisionTable,
    audit: str = "",
) -> None:
    """Write ``<repository>/<guard>/README.md``."""
    text = CARD.format(
        name=spec.name,
        audit=f"- {audit}\n" if audit else "",
        release=spec.release,
        classifier=classifier,
        source=spec.data.source,
        image={"float32": "fp32 with pixels in [0, 1]", "uint8": "uint8, pixels from 0 to 255"}[spec.serving.input],
        classes=f"{widths.classes} classes",
        n=measured["n_clean"],
        queries=SQUARE_QUERIES,
        alpha=percent(spec.target_fpr),
        table=markdown_table(*figure_rows(measured)),
        precisions=markdown_table(*precision_rows(precisions)),
        autoencoder=spec.autoencoder.network,
        train=spec.data.train,
        noise_sd=spec.autoencoder.noise_sd,
        guided=f"; half of it along the classifier's gradient, features weighted {spec.autoencoder.guidance:g}"
        if spec.autoencoder.guidance
        else "",
        patches=f", {percent(spec.autoencoder.patches, 0)} of them also with a random patch" if spec.autoencoder.patches else "",
        blocks=f"; {percent(BLOCK_SHARE, 0)} of the images with noise in blocks of up to {spec.autoencoder.blocks:g} instead"
        if spec.autoencoder.blocks
        else "",
        detectors=", ".join(f"`{detector.name}`" for detector in spec.detectors),
        hardened=f"- hardened copy of the classifier: {spec.hardened.epochs} epochs against changes of up to {spec.hardened.eps:g}\n"
        if spec.hardened
        else "",
        memory=f"- memory: what {spec.memory.neighbours} of the last {spec.memory.size} inputs nearly repeat is malicious too\n"
        if spec.memory
        else "",
        fit=spec.data.fit,
        calibrate=spec.data.calibrate,
        natural=spec.natural_noise_sd,
        levels=spec.noise_levels,
        runtime=spec.runtime,
        precision=spec.precision,
        seed=spec.seed,
    )
    folder = repository / spec.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(text)
