"""Which tokens of one text skip which FFN blocks, and how saturated the full model finds them.

Two parallel passes: a clean one for `cos_i`, and a teacher-forced one with skipping on. Teacher forcing
is exact: the decisions are those of decoding the same text token by token.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from skipcal.arch.limits import check_ids, check_length
from skipcal.arch.locate import Architecture, input_device, locate, unwrap
from skipcal.calibrate.capture import capture
from skipcal.core.policy import Policy, SkipPolicy
from skipcal.core.report import SkipReport
from skipcal.core.substituted import Substituted
from skipcal.core.whole_layers import ShortGPT, SkipDecode
from skipcal.errors import ConfigError
from skipcal.profiles.fits import warn_of_other_opening
from skipcal.profiles.schema import SkipProfile
from skipcal.runtime.session import skipping
from skipcal.text.opening import row_ids

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

TokenPart = Literal["prompt", "warm-up", "decoded"]


@dataclass(frozen=True, eq=False)
class TokenMap:
    """What each token of a text skips. A token's row is the decode step that *reads* it.

    pieces:     the tokens as text: together they are the text, special tokens included. Of a character
                that takes several tokens the last has it, the others are empty.
    ids:        the tokens as the model was given them.
    cosine:     [tokens, layers] float32, `cos_i` of the full model.
    skipped:    [tokens, layers] bool, with skipping on; never in the prompt and in the warm-up.
    layers:     those that the policy may skip, ascending.
    most_skips: the most of them that it can skip for one token.
    prompt_tokens, warm_up_tokens: how many tokens at the start are the prompt, and decode steps after them
                that run the full model.
    report:     of the pass with skipping on; where whole layers are skipped, each counts as its FFN.
    """

    pieces: tuple[str, ...]
    ids: tuple[int, ...]
    cosine: np.ndarray
    skipped: np.ndarray
    layers: tuple[int, ...]
    most_skips: int
    prompt_tokens: int
    warm_up_tokens: int
    report: SkipReport

    @property
    def text(self) -> str:
        """The text as the tokenizer decodes it, special tokens included."""
        return "".join(self.pieces)

    @property
    def skip_ratio(self) -> float:
        """Skipped blocks / (L x tokens past the warm-up); NaN when there is no such token."""
        return self.report.skip_ratio

    @property
    def parts(self) -> tuple[TokenPart, ...]:
        """What each token is: of the prompt, of the warm-up, or decoded under the policy."""
        free = self.prompt_tokens + self.warm_up_tokens
        return tuple(
            "prompt" if n < self.prompt_tokens else "warm-up" if n < free else "decoded"
            for n in range(len(self.ids))
        )

    @property
    def shares(self) -> np.ndarray:
        """FFNs that each token skipped, over the most it could: [tokens] float64 within [0, 1]."""
        counts: np.ndarray = self.skipped.sum(axis=1, dtype=np.float64)
        return counts / max(self.most_skips, 1)

    def to_frame(self) -> pd.DataFrame:
        """Long form, a row for each token and layer: token, piece, id, part, layer, cosine, skipped."""
        import pandas as pd

        tokens, layers = self.skipped.shape
        return pd.DataFrame(
            {
                "token": np.repeat(np.arange(tokens), layers),
                "piece": np.repeat(np.asarray(self.pieces, dtype=object), layers),
                "id": np.repeat(np.asarray(self.ids), layers),
                "part": np.repeat(np.asarray(self.parts, dtype=object), layers),
                "layer": np.tile(np.arange(layers), tokens),
                "cosine": self.cosine.ravel(),
                "skipped": self.skipped.ravel(),
            }
        )


def token_map(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    profile: SkipProfile | Policy,
    text: str | Sequence[int],
    *,
    target_skip_ratio: float | None = None,
    prompt_tokens: int = 1,
    warm_up_tokens: int | None = None,
    architecture: Architecture | None = None,
) -> TokenMap:
    """Find out which tokens of `text` skip which FFN blocks, exactly as decoding it would.

    profile:           a profile, or a policy: a SkipPolicy, or what `skipcal.make_policy` gives.
    text:              a text, which begins with the special tokens that the tokenizer puts before one; or
                       token ids, as of a prompt and what was generated after it. generate() never reads
                       the last token it makes: without that one the counts are those of its report.
    target_skip_ratio: picks another of the profile's operating points.
    prompt_tokens:     tokens that are the prefill, by the full model.
    warm_up_tokens:    instead of the policy's; 0 lets every token after the prompt be decided.
    architecture:      what `locate(model)` returned, to save proving the model again.

        tokens = skipcal.token_map(loaded.model, loaded.tokenizer, profile, "Rain fell.", warm_up_tokens=0)
        print(tokens.skip_ratio)

    Raises ConfigError for a text that is too short or too long and for options that do not fit together,
    and otherwise as `skipping` does.
    """
    inner = unwrap(model)
    if isinstance(profile, SkipProfile):
        profile.check_fits(inner)
        warn_of_other_opening(profile, tokenizer)
    policy = _policy(profile, target_skip_ratio, warm_up_tokens)
    ids = _ids(tokenizer, text, inner, prompt_tokens)
    found = architecture or locate(inner)
    batch = torch.tensor([ids], device=input_device(inner))
    cosine, skipped, report = _passes(inner, found, policy, batch, prompt_tokens)
    made = TokenMap(
        pieces=_pieces(tokenizer, ids),
        ids=tuple(ids),
        cosine=cosine,
        skipped=skipped,
        layers=tuple(sorted(_layers(policy))),
        most_skips=_most_skips(policy),
        prompt_tokens=prompt_tokens,
        warm_up_tokens=policy.warm_up_tokens,
        report=report,
    )
    if "decoded" not in made.parts:
        logger.warning(
            "all %d tokens lie within the prompt of %d and the warm-up of %d, so none is skipped; give a "
            "longer text or warm_up_tokens=0",
            len(ids), prompt_tokens, policy.warm_up_tokens,
        )  # fmt: skip
    return made


@torch.no_grad()
def _passes(
    model: nn.Module, architecture: Architecture, policy: Policy, batch: Tensor, prompt_tokens: int
) -> tuple[np.ndarray, np.ndarray, SkipReport]:
    """The clean pass over `batch` [1, seq] and the one with skipping: cosines, skips, report."""
    with capture(model, architecture=architecture) as recorder:
        _run(architecture, batch)
    cosine, _ = recorder.take()
    skipped = np.zeros(cosine.shape, dtype=bool)

    def see(layer: int, skip: Tensor) -> None:
        skipped[:, layer] |= skip.cpu().numpy()

    with skipping(
        model, policy=policy, teacher_forced=True, prompt_tokens=prompt_tokens, architecture=architecture
    ) as run:
        run.watch(see)
        _run(architecture, batch)
    for values in (cosine, skipped):
        values.setflags(write=False)
    return cosine, skipped, run.report


def _run(architecture: Architecture, batch: Tensor) -> None:
    # The stack alone: nobody reads the logits.
    stack: Any = architecture.stack
    stack(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False)


def _policy(
    profile: SkipProfile | Policy, target_skip_ratio: float | None, warm_up_tokens: int | None
) -> Policy:
    """The policy that is asked for, with the warm-up that is asked for."""
    if isinstance(profile, SkipProfile):
        policy = profile.policy_for(target_skip_ratio)
    elif target_skip_ratio is not None:
        raise ConfigError("target_skip_ratio chooses among a profile's operating points; pass a profile")
    else:
        policy = profile
    if warm_up_tokens is None or warm_up_tokens == policy.warm_up_tokens:
        return policy
    if isinstance(policy, ShortGPT | SkipDecode):
        raise ConfigError(
            f"warm_up_tokens {warm_up_tokens} cannot be used: {policy.method} has no warm-up; leave it out"
        )
    if isinstance(policy, Substituted):
        return replace(policy, policy=_policy(policy.policy, None, warm_up_tokens))
    changed: Any = policy
    result: Policy = replace(changed, warm_up_tokens=warm_up_tokens)
    return result


def _layers(policy: Policy) -> Collection[int]:
    """Layers in which the policy may skip something."""
    if policy.method == "full":
        return ()
    if isinstance(policy, ShortGPT):
        return policy.removed
    return policy.make_rule().layers


def _most_skips(policy: Policy) -> int:
    """The most layers that the policy can skip for one token."""
    inner = policy.policy if isinstance(policy, Substituted) else policy
    return inner.most_skips() if isinstance(inner, SkipPolicy) else len(_layers(inner))


def _ids(tokenizer: Any, text: str | Sequence[int], model: Any, prompt_tokens: int) -> list[int]:
    """The token ids of `text`. Raises ConfigError for what the model cannot decode."""
    if isinstance(text, str):
        ids = row_ids(tokenizer, text)
    else:
        given = torch.as_tensor(text)
        if given.dim() != 1 or given.is_floating_point():
            raise ConfigError(
                f"text has shape {list(given.shape)} and dtype {given.dtype}; expected a str, or the token "
                "ids of one text, as output[0] of generate()"
            )
        ids = given.tolist()
    if prompt_tokens < 1:
        raise ConfigError(f"prompt_tokens {prompt_tokens} is below 1: a first token cannot be predicted")
    if len(ids) <= prompt_tokens:
        raise ConfigError(
            f"the text has {len(ids)} tokens, and {prompt_tokens} of them are the prompt; give a longer text"
        )
    check_length(model, len(ids), f"the text has {len(ids)} tokens, which do", lower="its length")
    check_ids(model, [ids])
    return ids


def _pieces(tokenizer: Any, ids: list[int]) -> tuple[str, ...]:
    """The text that each token brings, so that the pieces join to the decoded text.

    A token ends where what is decoded so far agrees with the whole: bytes of an unfinished character do
    not, so the token that finishes it brings it.
    """

    def decoded(count: int) -> str:
        text: str = tokenizer.decode(
            ids[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    whole = decoded(len(ids))
    pieces, end = [], 0
    for count in range(1, len(ids)):
        known = decoded(count)
        agreed = next((n for n in range(end, len(whole)) if known[n : n + 1] != whole[n]), len(whole))
        pieces.append(whole[end:agreed])
        end = agreed
    return (*pieces, whole[end:])
