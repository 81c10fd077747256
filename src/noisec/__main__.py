"""``python -m noisec``."""

from noisec.cli import main

main()
