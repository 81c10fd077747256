"""One file for each server. They run in environments without ``noisec``, as a package of their own: ``python -m servers.<name>``."""
