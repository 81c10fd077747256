"""NoiSec-Triton: label and "is this input an attack?" in one Triton call."""

__version__ = "0.1.0"
