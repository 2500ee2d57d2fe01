"""Shapes and types of the library are checked at run time, under pytest only.

The libraries are imported before: what is imported below a module of ours for the first time, the
hook has compiled anew. One thread a process: the models are tiny, and test processes run side by
side. hypothesis sets no deadline: its 0.2 s count the first call's imports and a busy machine, not
a defect.
"""

import os
import signal

import pytest
import transformers
import trl
from hypothesis import settings
from jaxtyping import config, install_import_hook

os.environ["OMP_NUM_THREADS"] = "1"
IMPORTED = (transformers.Trainer, trl.SFTTrainer)  # which bring the others
install_import_hook(["pipeline", "stages"], "beartype.beartype")
settings.register_profile("house", deadline=None)
settings.load_profile("house")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it


@pytest.fixture
def unchecked():
    """For tests that call small functions so often that checking them is a third of the work."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
