"""What profiles are worth on text that is not theirs: realised skip ratio and perplexity.

Each profile's threshold is used on each text, in one teacher-forced pass over known rows: the same
decisions and logits as decoding that text token by token with skipping.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from skipcal.arch.limits import check_ids, check_length
from skipcal.arch.loading import LoadedModel
from skipcal.arch.locate import input_device, locate
from skipcal.core.policy import SkipPolicy
from skipcal.errors import ConfigError, TargetOutOfReach
from skipcal.profiles.parts import CorpusInfo
from skipcal.profiles.schema import SkipProfile
from skipcal.runtime.session import skipping
from skipcal.text.batching import batches, padded
from skipcal.text.chat import sample_prompts
from skipcal.text.corpora import Corpus, CorpusSample, file_sha256, sample_corpus

Rows = Sequence[list[int]]
FULL_MODEL = "full model"


def transfer(
    loaded: LoadedModel,
    profiles: Mapping[str, SkipProfile],
    texts: Mapping[str, Rows],
    *,
    target_skip_ratio: float | None,
    prompt_tokens: int,
    batch_size: int = 8,
) -> pd.DataFrame:
    """One row per profile and text: what the profile's threshold realises there.

    texts:             rows of token ids. Tokens below `prompt_tokens` of a row are its prefill.
    target_skip_ratio: whose operating point each profile gives; None: its recommended policy.

    Columns: profile, text, target_skip_ratio, threshold, cold_s, cold_e, realised_skip_ratio,
    perplexity, full_perplexity (the full model's, over the same tokens), tokens. Scored are tokens
    predicted by a decode step past the longest warm-up of all profiles, their losses taken in float32.

    Raises ProfileMismatch for a profile of another model, TargetOutOfReach for a target that a
    profile does not reach, ConfigError for texts that are too short or too long.
    """
    policies = {name: policy_of(name, profile, target_skip_ratio) for name, profile in profiles.items()}
    for profile in profiles.values():
        profile.check_fits(loaded.model)
    model: Any = loaded.model
    for name, rows in texts.items():
        _check_lengths(name, rows, policies.values(), prompt_tokens, model)
    architecture = locate(model)
    # One set of tokens for all, or profiles with another warm-up would be scored on easier ones.
    first = prompt_tokens + max(policy.warm_up_tokens for policy in policies.values())
    measured = []
    with tqdm(total=len(texts) * (len(policies) + 1), desc="transfer", unit="pass", disable=None) as bar:
        for text, rows in texts.items():
            full = _losses(model, rows, batch_size)
            bar.update()
            for name, policy in policies.items():
                with skipping(
                    model,
                    policy=policy,
                    teacher_forced=True,
                    prompt_tokens=prompt_tokens,
                    architecture=architecture,
                ) as run:
                    losses = _losses(model, rows, batch_size)
                measured.append(
                    {
                        "profile": name,
                        "text": text,
                        "target_skip_ratio": target_skip_ratio,
                        "threshold": policy.threshold,
                        "cold_s": policy.cold_s,
                        "cold_e": policy.cold_e,
                        "realised_skip_ratio": run.report.skip_ratio,
                        "perplexity": _perplexity(losses, first),
                        "full_perplexity": _perplexity(full, first),
                        "tokens": sum(len(row[first:]) for row in losses),
                    }
                )
                bar.update()
    return pd.DataFrame(measured)


def transfer_matrix(frame: pd.DataFrame, value: str) -> pd.DataFrame:
    """One value of `transfer` with profiles as rows and texts as columns, in their order.

    For "perplexity" a last row, "full model", says what each text costs without skipping.
    """
    matrix = frame.pivot(index="profile", columns="text", values=value)
    matrix = matrix.loc[frame["profile"].unique(), frame["text"].unique()]
    if value == "perplexity":
        matrix.loc[FULL_MODEL] = frame.groupby("text")["full_perplexity"].first()
    return matrix.rename_axis(index=None, columns=None)


def policy_of(name: str, profile: SkipProfile, target_skip_ratio: float | None) -> SkipPolicy:
    """The profile's policy for a target; raises TargetOutOfReach that says whose it is."""
    try:
        return profile.cosine_policy_for(target_skip_ratio)
    except TargetOutOfReach as error:
        raise TargetOutOfReach(f"profile {name!r}: {error}") from error


def held_out_texts(
    corpora: Iterable[Corpus],
    profiles: Iterable[SkipProfile],
    tokenizer: Any,
    *,
    rows: int,
    tokens: int,
    seed: int,
) -> dict[str, CorpusSample]:
    """Rows of `tokens` tokens from each corpus, apart from the prompts that any profile was made from.

    The prompts are drawn again as a profile says they were, where it used the same file or the
    same set of the hub; text of other sources is taken to be other text.
    """
    samples = {}
    for corpus in corpora:
        used = [row for profile in profiles for row in calibration_prompts(profile, corpus, tokenizer)]
        samples[corpus.name] = sample_corpus(
            corpus, tokenizer, prompts=rows, prompt_tokens=tokens, seed=seed, avoid=used
        )
    return samples


def calibration_prompts(profile: SkipProfile, corpus: Corpus, tokenizer: Any) -> list[list[int]]:
    """The prompts that a profile took from the source of `corpus`, drawn again."""
    digest = file_sha256(Path(corpus.source)) if corpus.local else None
    calibration, config = profile.calibration, profile.config
    prompts: list[list[int]] = []
    for info in calibration.corpora:
        if not _same_source(info, corpus, digest):
            continue
        sample = sample_prompts(
            replace(
                corpus,
                name=info.name,
                revision=info.revision,
                text_column=config.get("text_column", "text"),
                questions=info.name.partition(":")[0] if info.format else None,
                format=info.format,  # type: ignore[arg-type]  # a profile that names another fails to load
            ),
            _Whole(tokenizer) if info.opening is None and not calibration.chat_template else tokenizer,
            chat_template=calibration.chat_template,
            prompts=info.prompts,
            prompt_tokens=calibration.prompt_tokens,
            seed=calibration.seed,
            held_out=config.get("verify_prompts", 0) if config.get("verify") else 0,
        )
        prompts += sample.prompts
    return prompts


class _Whole:
    """A tokenizer whose special tokens are part of a text, as they were before rows had an opening.

    Of a stream the first window alone began with them. Texts of profiles from then are cut like that.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str, **_settings: Any) -> Any:
        return self._tokenizer(text, verbose=False)


def _same_source(info: CorpusInfo, corpus: Corpus, digest: str | None) -> bool:
    if corpus.local:
        return info.sha256 == digest
    same = (info.source, info.config) == (corpus.source, corpus.config)
    return same and info.sha256 is None and info.split in (None, corpus.split)


def _check_lengths(
    name: str, rows: Rows, policies: Iterable[SkipPolicy], prompt_tokens: int, model: Any
) -> None:
    longest = max(map(len, rows), default=0)
    warm_up = max((policy.warm_up_tokens for policy in policies), default=0)
    if longest < prompt_tokens + warm_up + 2:  # a step past the warm-up, and a token for it to predict
        raise ConfigError(
            f"text {name!r}: rows of {longest} tokens have none past the prompt of {prompt_tokens} and the "
            f"warm-up of {warm_up}; raise --text-tokens or lower --prompt-tokens"
        )
    check_length(model, longest, f"text {name!r}: rows of {longest} tokens do", lower="--text-tokens")
    check_ids(model, rows)


@torch.no_grad()
def _losses(model: Any, rows: Rows, batch_size: int) -> list[np.ndarray]:
    """Of each row, the negative log-likelihoods of its tokens from the second on, float32.

    Entry p is the loss of token p + 1, predicted from position p.
    """
    device = input_device(model)
    losses = []
    for batch in batches(rows, batch_size):
        ids, mask = padded(batch, device, side="right")
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # [batch, seq, vocab]
        for i, row in enumerate(batch):  # row by row, for float32 logits of a batch are large
            known = ids[i, 1 : len(row)].to(logits.device)
            loss = cross_entropy(logits[i, : len(row) - 1].float(), known, reduction="none")
            losses.append(loss.cpu().numpy())
    return losses


def _perplexity(losses: list[np.ndarray], first: int) -> float:
    """Of the tokens predicted from position `first` on."""
    return math.exp(np.concatenate([row[first:] for row in losses]).mean(dtype=np.float64))
