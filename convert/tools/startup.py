"""A faster start of the command-line programs."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Import PyTorch and modules that need it without garbage collection.

    Importing PyTorch creates about a million objects that live as long as the process. The collector would scan them
    repeatedly during the import, at each later full collection and at exit, which takes a quarter of the CPU time of a
    short program. So it is disabled during the import, and `gc.freeze` then excludes these objects from later
    collections. If PyTorch is already imported, as in a program that calls a `main` of this package, nothing changes.

    Yields:
        None; the imports belong in the body of the `with` statement.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
