"""Folders whose names give repeats and class tokens, such as `10_sks dog` or `10`, in a parent folder."""

import logging
import re
from pathlib import Path
from typing import Any

from lora_adapters.train.data_error import DataError

logger = logging.getLogger(__name__)
NAME = re.compile(r"(\d+)(?:_(.*))?", re.DOTALL)


def class_folders(parent: Path, flag: str, *, is_reg: bool) -> list[dict[str, Any]]:
    """Read folders named `N_class` as kohya's trainer does: N repeats, and the class for images without a caption.

    Folders named `N` or `N_` have no class. Other folders are left out with a warning.

    Args:
        parent: The folder that contains these folders.
        flag: The option, for messages.
        is_reg: Whether the images are for regularisation.

    Returns:
        Subset options for each folder, sorted by name.

    Raises:
        DataError: The folder does not exist, or contains no folder with such a name.
    """
    if not parent.is_dir():
        raise DataError(f"{flag}: {parent} is not a folder")
    subsets, left = [], []
    for folder in sorted(path for path in parent.iterdir() if path.is_dir()):
        match = NAME.fullmatch(folder.name)
        if match is None:
            left.append(folder.name)
            continue
        repeats, tokens = int(match[1]), match[2] or ""
        subsets.append(
            {"image_dir": str(folder), "num_repeats": repeats, "class_tokens": tokens, "is_reg": is_reg},
        )
    if not subsets:
        raise DataError(f"{flag}: {parent} has no folder named like 10_name (repeats, underscore, class) or 10")
    if left:
        logger.warning("%s: folders not named like 10_name or 10 are left out: %s", parent, ", ".join(left))
    return subsets
