"""A GGUF file as a checkpoint of plain weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def convert_gguf(place: str, file: str, folder: Path, *, name: str, revision: str | None = None) -> None:
    """Write the model of a GGUF file into `folder` as float32 safetensors, with its tokenizer.

    place: folder or hub id that has the file; name: what the model is to call itself.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": file, "revision": revision}
    model: Any = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **options)
    # The weights are plain float32 now; the reader's note that they were quantized cannot be saved.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.config._name_or_path = name
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(place, **options).save_pretrained(folder)
