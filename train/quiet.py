"""What the programs of this folder do first: silence imports, and let any text be printed on any console."""

import logging
import os


def quiet() -> None:
    """Call it before anything slow is imported: libraries then do not say what no user of these programs can use.

    What the environment says is left.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else they warn whenever a data worker starts
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else two warnings where there is no torchvision
    logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)  # else one about 4-bit layers, on CPUs

    from lora_adapters.convert.portable import tolerant_console

    tolerant_console()
