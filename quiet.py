"""Other libraries' remarks and bars: off the screens and out of the logs of people who asked for neither."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

# They warn of their own affairs: kernels for other GPUs, interfaces of torch that will go.
TALKATIVE = ("accelerate", "bitsandbytes", "torchao", "torch.utils._pytree")


@contextmanager
def remarks_off() -> Iterator[None]:
    """Inside, the libraries of TALKATIVE say what goes wrong and nothing less."""
    loggers = [logging.getLogger(name) for name in TALKATIVE]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(max(logger.level, logging.ERROR))
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def bars_on_a_terminal() -> Iterator[None]:
    """Inside, transformers draws bars only where stderr is a terminal, and TQDM_DISABLE lets it."""
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging as theirs

    gguf: Any = modeling_gguf_pytorch_utils

    drawn = theirs.is_progress_bar_enabled()
    off = not sys.stderr.isatty() or os.environ.get("TQDM_DISABLE") == "1"
    bar = gguf.tqdm  # which does not ask whether bars are wanted
    if off:
        theirs.disable_progress_bar()
        gguf.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        gguf.tqdm = bar
        if drawn:
            theirs.enable_progress_bar()
