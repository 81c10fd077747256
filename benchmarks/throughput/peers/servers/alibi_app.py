"""MLServer with alibi-detect's AdversarialAE, a detector of its own: only its time is taken.

Its classifier has the layers of the guard's (convolutions, pooling, dense; shortcuts left out) and its autoencoder those of alibi-detect's
CIFAR-10 example. Both keep the weights of a few training steps on random images, which take the time that good ones would take.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
from alibi_detect.ad import AdversarialAE
from alibi_detect.saving import save_detector

Shape = tuple[int, int, int]
"""(H, W, C)"""
LATENT = 40


def classifier(shape: Shape, layers: list[tuple[str, int, int, int]]) -> tf.keras.Model:
    """``(kind, outputs, kernel, stride)`` each"""
    made = [tf.keras.layers.InputLayer(input_shape=shape)]
    flat = False
    for index, (kind, outputs, kernel, stride) in enumerate(layers):
        last = index == len(layers) - 1
        if kind == "conv":
            made.append(tf.keras.layers.Conv2D(outputs, kernel, stride, padding="same", activation="relu"))
        elif kind == "pool":
            made.append(tf.keras.layers.MaxPool2D(kernel, stride))
        elif kind == "mean":
            made.append(tf.keras.layers.GlobalAveragePooling2D())
        else:
            made += [] if flat else [tf.keras.layers.Flatten()]
            made.append(tf.keras.layers.Dense(outputs, activation="softmax" if last else "relu"))
            flat = True
    return tf.keras.Sequential(made)


def autoencoder(shape: Shape) -> tuple[tf.keras.Sequential, tf.keras.Sequential]:
    """Encoder and decoder: 4x4 convolutions that halve the image as often as it can be halved, at most three times."""
    height, width, channels = shape
    halvings = next(count for count in (3, 2, 1, 0) if height % 2**count == 0 and width % 2**count == 0)
    widths = (32, 64, 256)[:halvings]
    small = (height >> halvings, width >> halvings, 128)
    down = [tf.keras.layers.Conv2D(width, 4, 2, padding="same", activation="relu") for width in widths]
    up = [tf.keras.layers.Conv2DTranspose(width, 4, 2, padding="same", activation="relu") for width in widths[:0:-1]]
    encoder = [tf.keras.layers.InputLayer(input_shape=shape), *down, tf.keras.layers.Flatten(), tf.keras.layers.Dense(LATENT)]
    decoder = [
        tf.keras.layers.InputLayer(input_shape=(LATENT,)),
        tf.keras.layers.Dense(int(np.prod(small)), activation="relu"),
        tf.keras.layers.Reshape(small),
        *up,
        tf.keras.layers.Conv2DTranspose(channels, 4, 2 if halvings else 1, padding="same"),
    ]
    return tf.keras.Sequential(encoder), tf.keras.Sequential(decoder)


def main() -> None:
    """``mlserver start FOLDER`` with a detector made from ``FOLDER/network.json``."""
    folder = Path(sys.argv[1])
    network = json.loads((folder / "network.json").read_text())
    shape = tuple(network["shape"])
    images = np.random.default_rng(0).random((128, *shape), np.float32)
    encoder, decoder = autoencoder(shape)
    detector = AdversarialAE(encoder_net=encoder, decoder_net=decoder, model=classifier(shape, network["layers"]))
    detector.fit(images, epochs=1, batch_size=64, verbose=False)
    detector.infer_threshold(images, threshold_perc=95)
    save_detector(detector, folder / "detector")
    os.execv(Path(sys.executable).with_name("mlserver"), ["mlserver", "start", str(folder)])


if __name__ == "__main__":
    main()
