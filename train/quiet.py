"""What libraries say when they are imported, and that no user of these programs can make use of."""

import logging
import os


def quiet() -> None:
    """Call it before anything slow is imported. What the environment says is left."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else they warn whenever a data worker starts
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else two warnings where there is no torchvision
    logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)  # else one about 4-bit layers, on CPUs
