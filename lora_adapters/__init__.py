"""Low-Rank Adaptation for Stable Diffusion, native to diffusers and PEFT.

Importing this package is cheap: diffusers and peft are plugged into when, and only when, somebody imports them.
"""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout, convert/ and train/ stand beside this folder. Python started there finds this folder before the
# installed package, so it has to be told that they belong to it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "convert").is_dir() and (_checkout / "train").is_dir() and str(_checkout) not in __path__:
    __path__.append(str(_checkout))
