"""A specification's data source -> four disjoint sets of clean images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from noisec.builders.images import Pools, Splits, cut
from noisec.builders.sources import cifar10, fashion_mnist, folder, gtsrb, npz, pneumoniamnist
from noisec.builders.sources.faults import Faults
from noisec.builders.spec import DataSpec
from noisec.errors import NoisecError

SOURCES: dict[str, Callable[[DataSpec, Path, Faults], Pools]] = {
    "fashion-mnist": fashion_mnist.pools,
    "fashion-mnist-test": fashion_mnist.shipped_pools,
    "cifar10": cifar10.pools,
    "pneumoniamnist": pneumoniamnist.pools,
    "gtsrb": gtsrb.pools,
    "folder": folder.pools,
    "npz": npz.pools,
}


def load_splits(spec: DataSpec, seed: int, *, cache: Path, strict: bool = False) -> Splits:
    """Cut the source into its four disjoint sets: ``train`` and ``fit`` from the first pool, ``calibrate`` and ``report`` from the
    held-out one, or all four from one pool where there is no other.

    Args:
        cache: folder for decoded images, kept between runs
        strict: a file or row that cannot be used is an error; otherwise it is named and left out

    Raises:
        NoisecError: the source is unreadable or too small, or a class is missing from the training set.
    """
    faults = Faults()
    pools = SOURCES[spec.source](spec, cache, faults)
    faults.finish(strict)
    pool, held_out = pools.learn, pools.held_out
    learn, judge = (spec.train, spec.fit), (spec.calibrate, spec.report)
    parts = cut(pool, (*learn, *judge), [seed]) if held_out is None else [*cut(pool, learn, [seed]), *cut(held_out, judge, [seed, 1])]
    names = _class_names(spec, pools)
    absent = sorted(set(range(len(names))) - set(parts[0].labels.tolist()))
    if absent:
        raise NoisecError(
            f"classes {absent} have no image in the {len(parts[0])} training images; give more images or leave the classes out"
        )
    train, fit, calibrate, report = parts
    return Splits(train, fit, calibrate, report, names, pools.digest)


def _class_names(spec: DataSpec, pools: Pools) -> tuple[str, ...]:
    """The specification's names, else the source's, else numbers."""
    labels = [images.labels.max() for images in (pools.learn, pools.held_out) if images is not None]
    classes = len(pools.class_names) or int(max(labels)) + 1
    if spec.class_names and len(spec.class_names) != classes:
        raise NoisecError(f"data.class_names has {len(spec.class_names)} names; the labels go from 0 to {classes - 1}")
    return spec.class_names or pools.class_names or tuple(map(str, range(classes)))
