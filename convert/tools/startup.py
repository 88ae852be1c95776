"""A faster start of the command-line programs."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Import PyTorch and what needs it without garbage collection.

    Importing PyTorch makes about a million objects that live as long as the process. The collector would search them
    repeatedly while they are made, at each later full collection and at exit, which is a quarter of the CPU time of a
    short program. So it is switched off meanwhile, and `gc.freeze` then excludes these objects from later collections.
    If PyTorch is already imported, as in a program that calls a `main` of this package, nothing is changed.

    Yields:
        None; the imports are the body of the `with` statement.
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
