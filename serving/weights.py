"""The fingerprint of a checkpoint as vLLM loads it, for a profile that holds for certain weights."""

from __future__ import annotations

from typing import Any

from skipcal.arch.loading import fingerprint_of, weight_mark


def served_fingerprint(vllm_config: Any, model: Any) -> str | None:
    """What `fingerprint` says of the same model in transformers; None where the format has no such names.

    As for mixtures, whose experts are stored one by one, and put together by transformers.

    vLLM fuses and packs what it has loaded, so the checkpoint is read once more, tensor by tensor.
    """
    from vllm.model_executor.model_loader import get_model_loader

    model_config = vllm_config.model_config
    loader = get_model_loader(vllm_config.load_config)
    if not hasattr(loader, "get_all_weights"):
        return None
    marks = {
        name: weight_mark(name, weight.to(model_config.dtype))
        for name, weight in loader.get_all_weights(model_config, model)
        if name.endswith((".weight", ".bias"))
    }
    if "model.embed_tokens.weight" not in marks or any(".experts." in name for name in marks):
        return None
    if model_config.hf_text_config.tie_word_embeddings:
        marks.pop("lm_head.weight", None)
    return fingerprint_of(marks)
