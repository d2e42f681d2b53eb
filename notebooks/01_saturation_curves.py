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
# # Saturation curves
#
# In the middle layers of a language model, the residual stream before a feed-forward (FFN) block and after
# it is nearly parallel. A *profile* is what skipcal has measured of that on one model. This notebook draws
# one that comes with skipcal, and says how sure it is. Only the bootstrap and the heat map run the model,
# SmolLM2-135M-Instruct, on a few hundred tokens.

# %%
from dataclasses import replace
from importlib import resources

import matplotlib.pyplot as plt
import pandas as pd

import skipcal
from skipcal import load_model
from skipcal.configs.run import ProfileConfig
from skipcal.plots.distribution import plot_cosine_distribution
from skipcal.plots.regions import plot_region_bootstrap
from skipcal.plots.tokens import plot_tokens
from skipcal.profiles.curve import saturation_figure
from skipcal.style import style

profile = skipcal.SkipProfile.load("smollm2-135m-instruct")  # or the path of your own
print(f"{profile.model.name}, {profile.model.num_layers} layers, {profile.model.dtype}")
print("mode:", profile.calibration.mode)
for corpus in profile.calibration.corpora:
    print(f"{corpus.name}: {corpus.tokens:,} tokens")

# %% [markdown]
# ## The curve
#
# `cos(h, h + f)` compares the stream `h` that enters an FFN block, after attention, with the stream that
# leaves it, for one token, in float32. Near 1 the block turned the stream very little. A line is the mean
# over all tokens of a corpus, its band the middle half of them. By the paper's rule, FFNs of the red layers
# always run; in the yellow region a token whose cosine reaches the threshold skips the FFNs that follow, up
# to the region's end.

# %%
figure = saturation_figure(profile)
figure.set_dpi(72)
for warning in profile.regions.warnings:
    print("warning:", warning)

# %% [markdown]
# ## Behind the mean
#
# The rule decides for every token, so what counts is how tokens are spread. A column is the histogram of
# one layer, with its colours logarithmic: a token in a hundred can still be seen.

# %%
with style():
    figure, (whole, near) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained", dpi=80)
    plot_cosine_distribution(profile, ax=whole, colorbar=False)
    plot_cosine_distribution(profile, ax=near).set(ylim=(0.9, 1), title="from 0.9 on")

# %% [markdown]
# ## How sure is the region?
#
# The region's ends are fitted to the mean curve. Had other prompts been drawn, where would they lie? The
# profile keeps the 95 % bootstrap intervals. Here a small calibration of its own (the text itself, 6
# windows of 40 tokens from each of two short texts) is resampled 200 times over its windows, and the fits
# are counted.

# %%
print("the profile: cold_s", profile.regions.cold_s_interval, "cold_e", profile.regions.cold_e_interval)
loaded = load_model(device="cpu")
text = resources.files("skipcal.text") / "embedded"
files = [f"{name}={text / name}.txt" for name in ("encyclopedic", "web")]
small = ProfileConfig(mode="prefill", data_files=files, prompts=6, prompt_tokens=40, closed_loop_prompts=0)
traces = skipcal.calibrate_model(loaded, small).traces
with style():
    figure, axes = plt.subplots(1, 2, figsize=(11, 2.8), layout="constrained", dpi=80, sharey=True)
    for trace, ax in zip(traces, axes, strict=True):
        plot_region_bootstrap([trace], ax=ax).set_title(f"{trace.corpus}, {trace.tokens} tokens")

# %% [markdown]
# ## Which words skip which FFNs?
#
# One sentence under the paper's rule, at the threshold of the profile's operating point for 0.25. Colour is
# the cosine of the full model. A red dot is an FFN that is skipped, with the earlier skips of the token in
# effect. Usually the first 25 decoded tokens are a warm-up by the full model; here every token after the
# first is decided.

# %%
policy = replace(profile.cosine_policy_for(0.25), warm_up_tokens=0)
sentence = "The Danube begins in the Black Forest and flows past Vienna and Budapest to the Black Sea."
tokens = skipcal.token_map(loaded.model, loaded.tokenizer, policy, sentence)
with style():
    figure, ax = plt.subplots(figsize=(11, 4.6), layout="constrained", dpi=80)
    plot_tokens(tokens, ax=ax)
counts = tokens.skipped.sum(axis=1)  # FFNs that each token skips
print("FFNs skipped:", *(f"{piece}({count})" for piece, count in zip(tokens.pieces, counts, strict=True)))
print(f"skip ratio of the sentence: {tokens.skip_ratio:.3f} of all FFN blocks")

# %% [markdown]
# ## From a threshold to a skip ratio
#
# Ratios are fractions of all FFN blocks, over tokens past the warm-up. *Predicted* is what a threshold
# skips on the recorded cosines, on which nothing was skipped; *realised* was measured with skipping on;
# *verified* by decoding prompts that the calibration has not seen. One sentence may lie far from any of
# them.

# %%
pd.DataFrame([point.model_dump() for point in profile.operating_points]).round(4)

# %% [markdown]
# Every number of the profile is also a table in long form, ready for pandas.

# %%
frame = profile.to_frame()
frame.pivot_table(index="layer", columns=["corpus", "stat"], values="value")["pooled"].round(4).head(5)
