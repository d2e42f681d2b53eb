"""README.md of an exported checkpoint: what it is, and what runs it."""

from __future__ import annotations

from typing import Any

from skipcal.export.layout import EXPERTS, WIDTH, Layout
from skipcal.files.markdown import escaped


def readme(record: dict[str, Any], layout: Layout) -> str:
    """The card. record: what skipcal_export.json says."""
    layers, total = record["layers"], record["num_layers"]
    listed = ", ".join(map(str, layers))
    return f"""---
base_model: {record["model"]["name"]}
tags: [skipcal]
---

# {escaped(record["model"]["name"])} without {len(layers)} of its {total} FFNs

Made by skipcal {record["environment"]["skipcal"]} (`skipcal export`, method `{record["method"]}`): the
feed-forward blocks of the layers {listed} (0-based) are left out, for every token, of prompts too.
Attention runs in all layers, and all other weights are the model's own. It is another model than the one it
was made from, and writes other text; how much is lost is for `skipcal evaluate` to say, or lm-eval.

It needs neither skipcal nor code of its own. Engines take it for a mixture of experts
(`{layout.model_type}`): the layers in `mlp_only_layers` have the model's FFN. In each of the others a token
gets one of {EXPERTS} experts of width {WIDTH} whose weights are zeros: exactly 0 is added to the stream.

    vllm serve FOLDER
    AutoModelForCausalLM.from_pretrained("FOLDER")

`skipcal_export.json` has the layers, the model's revision and versions.
"""
