"""A tiny model with a profile, as it is served, and what it decodes alone in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from conftest import lively, saved, word_tokenizer
from gated import with_gate

from skipcal.arch.loading import LoadedModel
from skipcal.calibrate.pipeline import calibrate_model
from skipcal.configs.run import ProfileConfig
from skipcal.profiles.methods import Ask, make_policy
from skipcal.profiles.schema import SkipProfile
from skipcal.runtime.session import skipping

PROMPTS = [[5, 17, 31, 8, 44], [7, 12], [60, 61, 62, 63, 3, 9, 27], [90], [4, 4, 50], [33, 71, 6, 19]]
NEW = [14, 20, 9, 24, 16, 11]
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "ffn-skip": {"target_skip_ratio": 0.2},
    "gate": {"target_skip_ratio": 0.3},
    "static": {"target_skip_ratio": 0.25},
    "static+surrogates": {"target_skip_ratio": 0.25},
}


class Served:
    """A tiny model with its profile, in a folder; and what decoding it in transformers gives."""

    shape: ClassVar[dict[str, int]] = {
        "hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
        "num_hidden_layers": 8,
    }  # fmt: skip
    # vLLM makes a shared expert of it, which the checkpoint has not.
    own: ClassVar[dict[str, dict[str, int]]] = {"qwen3_moe": {"shared_expert_intermediate_size": 0}}

    @torch.no_grad()
    def __init__(self, family: str, folder: Path, text: Path) -> None:
        torch.manual_seed(0)
        self.model: Any = lively(family, **self.shape, **self.own.get(family, {}))
        for parameter in self.model.parameters():
            if parameter.dim() == 3:  # of all experts: as large as `lively` makes other weights
                parameter.normal_(0.0, 0.28)
        self.folder = saved(self.model, folder / "model")
        loaded = LoadedModel(model=self.model, tokenizer=word_tokenizer(), name=self.folder, revision=None)
        config = ProfileConfig(
            data_files=[str(text)], prompts=8, prompt_tokens=8, new_tokens=16, warm_up_tokens=2,
            closed_loop_prompts=4, cold_s=1, cold_e=7, device="cpu",
        )  # fmt: skip
        profile = calibrate_model(loaded, config).profile
        self.profile = with_gate(profile, layers=(1, 2, 3, 4, 5, 6), model=self.model)
        self.file = folder / "profile.json"
        self.profile.save(self.file)

    def settings(self, method: str, **more: Any) -> dict[str, Any]:
        return {"profile": str(self.file), "method": method, **METHODS[method], **more}

    def run(
        self, method: str, *, new: list[int] = NEW, extra: list[Any] | None = None, **more: Any
    ) -> dict[str, Any]:
        """A run of every prompt, as tests/served.py takes it."""
        asked = extra or [None] * len(PROMPTS)
        return {"skipcal": self.settings(method, **more), "prompts": PROMPTS, "new": new, "extra": asked}

    def alone(
        self,
        method: str,
        *,
        new: list[int] = NEW,
        warm_up: int | None = None,
        target: float | None = None,
        profile: Path | None = None,
        models: list[Any] | None = None,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Tokens of each prompt, and what it skipped by layer.

        target: another than the method's; profile: another one than the model's own; models: by prompt,
        another model than the profile's.
        """
        ratio = METHODS[method].get("target_skip_ratio") if target is None else target
        ask = Ask(target_skip_ratio=ratio, new_tokens=0, warm_up_tokens=warm_up)
        policy = make_policy(method, SkipProfile.load(profile or self.file), ask)
        texts, skipped = [], []
        for model, prompt, count in zip(models or [self.model] * len(PROMPTS), PROMPTS, new, strict=True):
            ids = torch.tensor([prompt])
            with skipping(model, policy=policy, engine="eager") as run:
                written = model.generate(ids, max_new_tokens=count, do_sample=False)
            texts.append(written[0, len(prompt) :].tolist())
            skipped.append(list(run.report.skipped_per_layer))
        return texts, skipped
