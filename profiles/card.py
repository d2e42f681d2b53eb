"""A profile as a section of a model card: Markdown for README.md of a model folder or hub repository.

Everything in it is taken from the profile, which may come from anyone: text of its own is escaped, so that it
shows as it is and is no markup.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable
from typing import TYPE_CHECKING

from skipcal.profiles.markdown import escaped, fenced, table
from skipcal.profiles.own_model import of_embedded_model
from skipcal.profiles.parts import CorpusInfo, GateSettings, StaticSettings
from skipcal.profiles.reading import printable
from skipcal.profiles.summary import is_policy, ranges, ratio

if TYPE_CHECKING:
    from skipcal.profiles.schema import SkipProfile

FIGURE_FILE = "skip_profile.png"  # beside README.md
PAPER = "https://arxiv.org/abs/2404.03865"
CITATION = """\
@inproceedings{jaiswal2024ffnskipllm,
  title     = {{FFN-SkipLLM}: A Hidden Gem for Autoregressive Decoding with Adaptive Feed Forward Skipping},
  author    = {Jaiswal, Ajay and Hu, Bodun and Yin, Lu and Ro, Yeonju and Liu, Shiwei and Chen, Tianlong and
               Akella, Aditya},
  booktitle = {Proceedings of EMNLP},
  year      = {2024},
  note      = {arXiv:2404.03865}
}"""


def card_section(profile: SkipProfile, source: str) -> str:
    """The section, from its heading on. source: how it names the profile, a file or a hub id."""
    parts = [
        "## FFN skip profile",
        _opening(profile),
        f"![Saturation curve: mean cosine by layer]({FIGURE_FILE})",
        _facts(profile),
        "### Calibration text",
        _corpora(profile),
        "### Operating points",
        _points(profile),
        *_gate(profile),
        *_tuning(profile),
        *(f"> **Warning:** {escaped(text)}" for text in profile.regions.warnings),
        "### Use",
        _commands(profile, source),
        _python(profile, source),
        "### Citation",
        _citation(profile),
    ]
    return printable("\n\n".join(parts)) + "\n"


def _opening(profile: SkipProfile) -> str:
    model = profile.model
    return (
        f"`skip_profile.json` says which feed-forward (FFN) blocks of {escaped(model.name)} a token does "
        "not need, so that decoding can leave them out. It was made with skipcal, after FFN-SkipLLM "
        f"([Jaiswal et al., EMNLP 2024]({PAPER})). The curve is the mean of cos(h, h + f) by layer, where "
        "h is the residual stream before an FFN block and f what the block adds to it."
    )


def _facts(profile: SkipProfile) -> str:
    model, made = profile.model, profile.environment
    revision = f", revision {escaped(model.revision)}" if model.revision else ""
    quantized = f", quantization {escaped(model.quantization)}" if model.quantization else ""
    weights = ", the copy that skipcal embeds" if of_embedded_model(profile) else ""
    rows = [
        ("model", f"{escaped(model.name)}{revision}{weights}"),
        (
            "shape",
            f"{model.num_layers} layers of width {model.hidden_size}, {escaped(model.dtype)}{quantized}",
        ),
        ("policy", _policy(profile)),
        ("skippable region", _region(profile)),
        (
            "made with",
            f"skipcal {escaped(made.skipcal)}, torch {escaped(made.torch)}, transformers "
            f"{escaped(made.transformers)}, {escaped(made.device)}, {escaped(made.created_at)}",
        ),
    ]
    return table(["", ""], rows)


def _policy(profile: SkipProfile) -> str:
    policy, layers = profile.policy, profile.gate.layers if profile.gate else []
    warm_up = f"the first {policy.warm_up_tokens} tokens of an answer are the full model's"
    if isinstance(policy, GateSettings):
        return f"rule `gate` in layers {ranges(layers)}, threshold {policy.threshold:.3f}; {warm_up}"
    if isinstance(policy, StaticSettings):
        stead = "with surrogates" if policy.surrogates else "without surrogates"
        return f"the FFNs of layers {ranges(policy.layers)} are skipped, {stead}; {warm_up}"
    bound = "" if policy.max_skips is None else f", at most {policy.max_skips} FFNs a token"
    return f"rule `cosine`, threshold {policy.threshold:.6f}{bound}; {warm_up}"


def _region(profile: SkipProfile) -> str:
    regions, policy = profile.regions, profile.cosine_policy
    text = f"layers {policy.cold_s} to {policy.cold_e - 1}" if policy.cold_s < policy.cold_e else "none"
    if regions.cold_s_interval and regions.cold_e_interval:
        first, end = regions.cold_s_interval, regions.cold_e_interval
        text += f"; 95 % bootstrap: from {first[0]} to {first[1]} on, before {end[0]} to {end[1]}"
    if regions.fit_r2 is not None:
        text += f"; R2 of the fit {regions.fit_r2:.4f}"
    if regions.monotonicity is not None:
        text += f", Spearman's rho of the middle {regions.monotonicity:.2f}"
    return text


def _corpora(profile: SkipProfile) -> str:
    how = profile.calibration
    if how.mode == "generate":
        told = (
            f"Prompts of {how.prompt_tokens} tokens, up to {how.new_tokens} generated after each; statistics "
            "are over the generated tokens"
        )
    else:
        told = f"Windows of {how.prompt_tokens} tokens; statistics are over the text itself"
    template = ", chat template applied" if how.chat_template else ""
    opening = f", each begun with {escaped(' '.join(how.opening))}" if how.opening else ""
    return f"{_texts(how.corpora, 'prompts')}\n\n{told}{opening}. Seed {how.seed}{template}."


def _texts(corpora: Iterable[CorpusInfo], unit: str) -> str:
    rows = [
        (
            escaped(c.name),
            escaped(c.place),
            escaped(c.revision or (f"sha256 {c.sha256[:12]}..." if c.sha256 else "-")),
            f"{c.documents:,}",
            f"{c.prompts:,}",
            f"{c.tokens:,}",
        )
        for c in corpora
    ]
    return (
        table(["corpus", "source", "version", "documents", unit, "tokens"], rows) if rows else "None named."
    )


def _points(profile: SkipProfile) -> str:
    if not profile.operating_points:
        return "There is none under the rule `cosine`: no FFN can be skipped within the region."
    rows = [
        (
            f"{point.target_skip_ratio:g}{_mark(is_policy(profile, point))}",
            f"{point.threshold:.6f}",
            ratio(point.predicted_skip_ratio),
            ratio(point.realised_skip_ratio),
            ratio(point.verified_skip_ratio),
        )
        for point in profile.operating_points
    ]
    how = {
        "teacher-forced": "measured over the calibration text, teacher-forced",
        "decode": "measured by decoding the calibration prompts",
    }.get(profile.calibration.closed_loop or "", "not measured")
    return (
        "By the paper's rule, `cosine`. Ratios are fractions of all FFN blocks, over tokens after the "
        "warm-up.\n\n"
        + table(["skip ratio", "threshold", "predicted", "realised", "held-out"], rows)
        + f"\n\nPredicted: on the clean trace. Realised: {how}. Held-out: by decoding other prompts, where "
        "there is a number."
    )


def _gate(profile: SkipProfile) -> list[str]:
    gate = profile.gate
    if gate is None:
        return []
    corpora = list(gate.operating_points[0].by_corpus) if gate.operating_points else []
    rows = [
        (
            f"{point.target_skip_ratio:g}{_mark(is_policy(profile, point))}",
            f"{point.threshold:.3f}",
            ratio(point.predicted_skip_ratio),
            ratio(point.realised_skip_ratio),
            *(ratio(point.by_corpus.get(name)) for name in corpora),
        )
        for point in gate.operating_points
    ]
    return [
        f"By the rule `gate`: a linear probe before each of {len(gate.layers)} FFNs decides, and a linear "
        f"map of rank {gate.fit.rank} ({100 * gate.fit.surrogate_share:.1f} % of an FFN's bytes) stands in "
        f"for what is skipped. Its tensors are in `{gate.tensors}`; they hold for these weights alone.",
        table(["skip ratio", "threshold", "predicted", "realised", *map(escaped, corpora)], rows),
        "Predicted: in the last sweep of the fit. Realised: on text that was not fitted on, teacher-forced; "
        "by corpus to the right. Fitted on:",
        _texts(gate.fit.corpora, "windows"),
    ]


def _tuning(profile: SkipProfile) -> list[str]:
    if profile.tuning is None:
        return []
    budget, point = profile.tuning.budget, profile.tuning.points[profile.tuning.chosen]
    allowed = {
        "KL": budget.max_kl,
        "perplexity increase": budget.max_perplexity_increase,
        "speed-up by bytes": budget.min_speedup,
    }
    asked = ", ".join(f"{name} {value:g}" for name, value in allowed.items() if value is not None)
    return [
        f"The policy was chosen by a search ({asked or 'no budget'}) over {profile.tuning.windows} windows "
        f"of text: {escaped(point.line)}, which skipped {point.skip_ratio_all:.3f} of all FFN blocks, the "
        f"warm-up included, at a KL of {point.kl:.4f} nats a token to the full model (95 % bootstrap "
        f"{point.kl_low:.4f} to {point.kl_high:.4f})."
    ]


def _mark(chosen: bool) -> str:
    return " (policy)" if chosen else ""


def _commands(profile: SkipProfile, source: str) -> str:
    model = profile.model
    words = [] if of_embedded_model(profile) else ["--model", model.name]
    if words and model.revision:
        words += ["--revision", model.revision]
    if words and model.trust_remote_code:
        words.append("--trust-remote-code")
    use = ["skipcal", "generate", *words, "--profile", source, "--prompt", "Why is the sky blue?"]
    cost = ["skipcal", "evaluate", *words, "--profile", source, "--task", "perplexity"]
    lines = [f"$ {shlex.join(command)}" for command in (["skipcal", "show", source], use, cost)]
    return "```console\n" + "\n".join(map(fenced, lines)) + "\n```"


def _python(profile: SkipProfile, source: str) -> str:
    model = profile.model
    arguments = [] if of_embedded_model(profile) else [_quoted(model.name)]
    if arguments and model.revision:
        arguments.append(f"revision={_quoted(model.revision)}")
    if model.dtype in ("bfloat16", "float16", "float32") and model.quantization is None:
        arguments.append(f"dtype={_quoted(model.dtype)}")
    if arguments and model.trust_remote_code:
        arguments.append("trust_remote_code=True")
    lines = [
        "import skipcal",
        "",
        f"loaded = skipcal.load_model({', '.join(arguments)})",
        f"profile = skipcal.SkipProfile.load({_quoted(source)})",
        'inputs = loaded.tokenizer("Why is the sky blue?", return_tensors="pt").to(loaded.model.device)',
        "with skipcal.skipping(loaded.model, profile) as run:",
        "    output = loaded.model.generate(**inputs, max_new_tokens=128)",
        "print(loaded.tokenizer.decode(output[0]))",
        "print(run.report.skip_ratio)",
    ]
    return "```python\n" + "\n".join(map(fenced, lines)) + "\n```"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _citation(profile: SkipProfile) -> str:
    version = re.sub(r"[^\w.+-]", "", profile.environment.skipcal)
    own = (
        f"@software{{skipcal,\n  title   = {{skipcal}},\n  author  = {{The skipcal authors}},\n"
        f"  version = {{{version}}},\n  year    = {{2026}}\n}}"
    )
    return f"```bibtex\n{CITATION}\n\n{own}\n```"
