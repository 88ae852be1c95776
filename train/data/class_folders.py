"""Folders that say how often and as what their images are trained: `10_sks dog` or `10` in a parent folder."""

import logging
import re
from pathlib import Path
from typing import Any

from lora_adapters.train.data_error import DataError

logger = logging.getLogger(__name__)
NAME = re.compile(r"(\d+)(?:_(.*))?", re.DOTALL)


def class_folders(parent: Path, flag: str, *, is_reg: bool) -> list[dict[str, Any]]:
    """Read folders named `N_class` as kohya's trainer does: N repeats, with the class as caption of images without one.

    Folders named `N` or `N_` have no class. Others are left out with a warning.

    Args:
        parent: The folder that contains them.
        flag: The option, for messages.
        is_reg: Whether the images are for regularisation.

    Returns:
        A table of subset options for each folder, sorted by name.

    Raises:
        DataError: There is no such folder, or none of its folders has such a name.
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
