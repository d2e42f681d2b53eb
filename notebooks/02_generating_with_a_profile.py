# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Generating with a profile
#
# A profile is used by putting `with skipcal.skipping(...)` around plain `generate()` of transformers. This
# notebook continues one text with SmolLM2-135M-Instruct, with all FFN blocks and with some of them skipped,
# shows which tokens skipped how many, and times both.

# %%
from dataclasses import replace
from html import escape

import matplotlib.pyplot as plt
from IPython.display import HTML
from transformers import TextStreamer

import skipcal
from skipcal import load_model
from skipcal.configs.bench import BenchConfig
from skipcal.plots.tokens import plot_tokens, tokens_html
from skipcal.speed.bench import Subject, run_bench
from skipcal.speed.table import to_frame
from skipcal.style import style

loaded = load_model(device="cpu")  # without a name: the embedded model
model, tokenizer = loaded.model, loaded.tokenizer
profile = skipcal.SkipProfile.load("smollm2-135m-instruct")  # a shipped profile, by its name

# %% [markdown]
# ## The policy
#
# A *target skip ratio* picks one of the profile's operating points: the share of FFN blocks that it
# skipped, on average, over the calibration's texts. This profile decides by a learned gate, and small
# linear maps stand in for the skipped FFNs. `cosine_policy_for` gives the paper's rule instead. Any policy
# can be changed before use: here the warm-up, the tokens at the start that the full model decodes, is cut
# from 25 to 8, for the text is short.

# %%
policy = replace(profile.policy_for(0.25), warm_up_tokens=8)
print(f"rule {policy.method}, threshold {policy.threshold:.3f}, warm-up {policy.warm_up_tokens} tokens")
print("the paper's rule:", profile.cosine_policy_for(0.25))

# %% [markdown]
# ## Side by side
#
# The second call streams its text while it is decoded, as it would without skipcal. After the `with` block
# the model is as it was before.

# %%
prompt = "A lighthouse is a tower with a bright lamp at its top. It"
inputs = tokenizer(prompt, return_tensors="pt")
options = {"max_new_tokens": 32, "do_sample": False}
full = model.generate(**inputs, **options)[0]
with skipcal.skipping(model, policy=policy) as run:
    skipped = model.generate(**inputs, **options, streamer=TextStreamer(tokenizer))[0]

# %% [markdown]
# `token_map` runs the text once more, in parallel, and tells what each token skipped; the decisions are
# those of decoding. The stronger the orange, the more of the FFNs that the policy may skip for a token were
# skipped. A token that differs from the full model's sends the text another way, so the two need not meet
# again.

# %%
tokens = skipcal.token_map(
    model, tokenizer, policy, skipped[:-1], prompt_tokens=inputs["input_ids"].shape[1]
)  # without the last token, which generate() never reads
cell = '<td style="text-align:left;vertical-align:top;width:50%">'
HTML(
    "<table><tr><th>full model</th><th>FFN blocks skipped</th></tr>"
    f"<tr>{cell}{escape(tokenizer.decode(full))}</td>{cell}{tokens_html(tokens)}</td></tr></table>"
)

# %%
with style():
    figure, ax = plt.subplots(figsize=(11, 4.6), layout="constrained", dpi=80)
    plot_tokens(tokens, ax=ax)

# %% [markdown]
# ## The report
#
# Ratios are fractions of all FFN blocks. `skip_ratio` is over the decode steps past the warm-up,
# `skip_ratio_all` over all of them. A target is a mean over many texts; a single one skips its own share.

# %%
report = run.report
print(f"skip ratio {report.skip_ratio:.3f} after the warm-up, {report.skip_ratio_all:.3f} over all steps")
print(f"{report.decode_steps} decode steps, {report.decode_steps_after_warm_up} after the warm-up")
print(f"{report.weight_bytes_saved / 1e9:.2f} GB of weights not read; engine {report.engine}")
print("skipped per layer:", *report.skipped_per_layer)
print(f"the token map's skip ratio: {tokens.skip_ratio:.3f}")

# %% [markdown]
# ## Speed
#
# To compare equal work, the bench forces a ratio (15 of the 30 blocks) while the whole decision is made.
# The arms take turns, so that a busy machine slows all of them; times are medians over all steps, *min* and
# *max* are of single rounds. `full` is the same session with nothing to skip, `watching` makes every
# decision and skips nothing, and `ideal_speed_up` is what the bytes not read allow.
#
# Half of the FFNs is far from half of the time: attention and the vocabulary always run, and so do the maps
# that stand in. At ratios at which this model still writes well, the gain on a CPU is small. And so few
# steps, on a machine with other work, cannot tell arms apart whose ranges overlap; `docs/speed.md` has longer
# measurements.

# %%
settings = BenchConfig(
    profile="smollm2-135m-instruct", ratios=[0.5], context_tokens=[16], new_tokens=8, rounds=2
)
speed = to_frame(run_bench(settings, Subject(model, loaded.name, random_weights=False, profile=profile)))
columns = ["arm", "skip_ratio", "step_ms", "tok_per_s", "ideal_speed_up"]
speed[[*columns, "speed_up_over_full", "speed_up_over_full_min", "speed_up_over_full_max"]].round(2)
