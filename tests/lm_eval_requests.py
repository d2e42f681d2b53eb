"""Requests as lm-eval makes them, of a tiny model under policies, and their answers by hand."""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.api.instance import Instance

from skipcal.core.chosen_ffns import ChosenFFNs
from skipcal.core.policy import Policy, SkipPolicy
from skipcal.core.whole_layers import ShortGPT, SkipDecode
from skipcal.runtime.greedy import until_stop
from skipcal.runtime.session import skipping

FULL = SkipPolicy(cold_s=0, cold_e=0, threshold=2.0, warm_up_tokens=0)
SOME = SkipPolicy(cold_s=0, cold_e=4, threshold=0.55, warm_up_tokens=1)
RANDOM = ChosenFFNs(method="random", layers=(0, 1, 2, 3), probability=0.5, warm_up_tokens=0)
SHORT = ShortGPT(removed=(2,))
DECODE = SkipDecode(num_layers=4, max_layers=4, min_layers=2, steps=6)
PAIRS = [
    ("w5 w17 w31", " w8 w44 w9 w12 w60"),
    ("w7", " w61 w62 w63 w9 w9 w10 w11"),
    ("w60 w61 w62 w63 w64 w65", " w5"),
    ("w60 w61 w62 w63 w64 w65", " w6"),
    ("w60 w61 w62 w63 w64", " w65 w6"),
    ("", "w20 w21 w22 w23"),
]


TEXTS = [" ".join(f"w{(7 * n + k) % 90 + 5}" for n in range(length)) for k, length in enumerate((30, 9, 50))]


def requests(kind: Any, arguments: list[tuple[Any, ...]], task: str = "t") -> list[Instance]:
    return [Instance(kind, {}, args, 0, metadata=(task, n, 1)) for n, args in enumerate(arguments)]


def ask(lm: Any, pairs: list[tuple[str, str]] = PAIRS) -> list[tuple[float, bool]]:
    answers: list[tuple[float, bool]] = lm.loglikelihood(requests("loglikelihood", list(pairs)))
    return answers


def stepwise(model: Any, policy: Policy, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The score by a loop over tokens, with a cache."""
    total, greedy = 0.0, True
    with skipping(model, policy=policy):
        out = model(torch.tensor([context]), use_cache=True)
        for token in continuation:
            scores = out.logits[0, -1].double().log_softmax(-1)
            total += float(scores[token])
            greedy &= int(scores.argmax()) == token
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
    return total, greedy


def ids(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


PROMPTS = ["w5 w17 w31 w8 w44 w9", "w7 w12", "w60 w61 w62 w63"]


def generate(lm: Any, prompts: list[str], **options: Any) -> list[str]:
    asked = [(text, {"until": [], "max_gen_toks": 12, **options}) for text in prompts]
    answers: list[str] = lm.generate_until(requests("generate_until", asked))
    return answers


def new_tokens(model: Any, policy: Policy, prompt: str, stop: int = 2, **options: Any) -> list[int]:
    """Up to and with the end of sequence, or the token of a stop word."""
    options = {"do_sample": False, "eos_token_id": [2, stop], "max_new_tokens": 12, **options}
    with skipping(model, policy=policy):
        row = torch.tensor([ids(prompt)])
        output = model.generate(row, attention_mask=torch.ones_like(row), **options)
    return until_stop(output[0, row.shape[1] :].tolist(), {2, stop})


def words(tokens: list[int], stop: int = 2) -> str:
    return " ".join(f"w{token}" for token in tokens if token > 2 and token != stop)
