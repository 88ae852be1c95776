"""Weight changes that adapters make to one module: one file for each kind of adapter."""

from .base import Delta
from .boft import BOFT
from .dora import DoRA
from .full import Full, WithBias
from .glora import GLoRA
from .hadamard import Hadamard
from .ia3 import IA3
from .kronecker import Kronecker
from .norm import Norm
from .oft import OFT
from .reading import read_module
from .tucker import Tucker

__all__ = [
    "BOFT",
    "IA3",
    "OFT",
    "Delta",
    "DoRA",
    "Full",
    "GLoRA",
    "Hadamard",
    "Kronecker",
    "Norm",
    "Tucker",
    "WithBias",
    "read_module",
]
