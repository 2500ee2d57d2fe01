"""Shapes and types of the library are checked at run time, under pytest only.

One thread a process: the models are tiny, and test processes run side by side.
"""

import os

from jaxtyping import install_import_hook

os.environ["OMP_NUM_THREADS"] = "1"
install_import_hook(["pipeline", "stages"], "beartype.beartype")
