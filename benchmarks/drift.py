"""Why a threshold tuned on the full model's text skips less in generation: the stream or the text?

    python benchmarks/drift.py --profile forced.json --data-files wikitext=wikitext2_raw_valid.txt \\
        --data-files c4=c4.jsonl          about 6 minutes on two cores

Held-out prompts are continued twice, by the full model and by the policy. On each text the policy's
skip ratio is measured with skipping on (teacher-forced, which equals decoding that text) and
predicted from the clean trace. If the perturbed stream were to blame, measured and predicted would
differ on one text; if the text is, they differ between texts.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from common import save

from skipcal.arch.loading import load_model
from skipcal.arch.locate import locate
from skipcal.calibrate.capture import capture
from skipcal.calibrate.recommend import predicted_skip_ratio
from skipcal.core.policy import SkipPolicy
from skipcal.profiles.schema import SkipProfile
from skipcal.runtime.session import skipping
from skipcal.text.batching import batches
from skipcal.text.corpora import resolve_corpora, sample_corpus

PROMPTS, HELD_OUT, LENGTH, NEW_TOKENS, BATCH = 32, 16, 64, 128, 32


def continued(model: Any, prompts: list[list[int]]) -> torch.Tensor:
    """Greedy continuations, [prompts, LENGTH + NEW_TOKENS]; the end of sequence is not allowed."""
    parts = []
    for batch in batches(prompts, BATCH):
        ids = torch.tensor(batch)
        length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        parts.append(
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **length)
        )
    return torch.cat(parts)


def described(model: Any, text: torch.Tensor, policy: SkipPolicy) -> dict[str, float]:
    """What the policy skips on a text, measured and predicted, and how varied the text is."""
    architecture = locate(model)
    with skipping(model, policy=policy, teacher_forced=True, prompt_tokens=LENGTH) as run:
        for part in text.split(BATCH // 2):
            architecture.stack(input_ids=part, use_cache=False)
    cosines = []
    with capture(model, architecture=architecture) as recorder:
        for part in text.split(BATCH // 2):
            architecture.stack(input_ids=part, use_cache=False)
            cosine, _ = recorder.take()
            shaped = cosine.reshape(*part.shape, -1)[:, LENGTH + policy.warm_up_tokens :]
            cosines.append(shaped.reshape(-1, shaped.shape[-1]))
    return {
        "skip_ratio": run.report.skip_ratio,
        "predicted_on_its_clean_trace": predicted_skip_ratio(np.concatenate(cosines), policy),
        "distinct_tokens": float(np.mean([len(set(row[LENGTH:])) / NEW_TOKENS for row in text.tolist()])),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--profile", required=True)
    parser.add_argument("--data-files", action="append", required=True)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.1, 0.25])
    options = parser.parse_args()
    profile = SkipProfile.load(options.profile)
    loaded = load_model(device="cpu")
    model: Any = loaded.model
    held_out: list[list[int]] = []
    for corpus in resolve_corpora([], options.data_files):
        sample = sample_corpus(
            corpus, loaded.tokenizer, prompts=PROMPTS, prompt_tokens=LENGTH, seed=0, held_out=HELD_OUT
        )
        held_out += sample.held_out
    full = continued(model, held_out)
    rows = []
    for target in options.targets:
        policy = profile.cosine_policy_for(target)
        with skipping(model, policy=policy) as run:
            own = continued(model, held_out)
        rows.append(
            {
                "target_skip_ratio": target,
                "threshold": policy.threshold,
                "decoded_skip_ratio": run.report.skip_ratio,
                "full_models_text": described(model, full, policy),
                "policys_own_text": described(model, own, policy),
            }
        )
    files = " ".join(f"--data-files {name.split('=')[0]}=..." for name in options.data_files)
    save(
        "drift",
        f"python benchmarks/drift.py --profile forced.json {files}",
        {"model": loaded.name, "held_out_prompts": len(held_out), "new_tokens": NEW_TOKENS, "points": rows},
    )


if __name__ == "__main__":
    main()
