"""LoRA adapters of random numbers, as files and merged into a model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RANK, ALPHA = 8, 16
PROJECTIONS = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@torch.no_grad()
def adapted(model: Any, folder: Path, seed: int) -> Any:
    """A copy of the model with a random adapter of its layers in it; `folder` has it as PEFT writes it."""
    random = torch.Generator().manual_seed(seed)
    merged = copy.deepcopy(model)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in merged.named_modules():
        if name.rpartition(".")[2] in PROJECTIONS:
            rows, columns = module.weight.shape
            down = torch.randn(RANK, columns, generator=random) / columns**0.5
            up = torch.randn(rows, RANK, generator=random) * module.weight.std()
            module.weight += ALPHA / RANK * up @ down
            key = f"base_model.model.{name}"
            tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "bias": "none",
        "target_modules": list(PROJECTIONS), "base_model_name_or_path": model.config.name_or_path,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return merged
