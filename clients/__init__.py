"""gRPC clients for production apps: NumPy and tritonclient, nothing else."""

from noisec.clients.asynchronous import AsyncGuardClient
from noisec.clients.blocking import GuardClient
from noisec.clients.results import Verdicts

__all__ = ["AsyncGuardClient", "GuardClient", "Verdicts"]
