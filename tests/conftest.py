"""Shapes and types of the library are checked at run time, under pytest only.

One thread a process: the models are tiny, and test processes run side by side. hypothesis sets no
deadline: its 0.2 s count the first call's imports and a busy machine, not a defect.
"""

import os
import signal

from hypothesis import settings
from jaxtyping import install_import_hook

os.environ["OMP_NUM_THREADS"] = "1"
install_import_hook(["pipeline", "stages"], "beartype.beartype")
settings.register_profile("house", deadline=None)
settings.load_profile("house")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
