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
# # Calibration data compared
#
# A profile is measured on text. How much does it depend on which? This notebook makes three small profiles
# of SmolLM2-135M-Instruct from three kinds of text, sets them side by side, and uses each on the text of
# the others.

# %%
import argparse
import inspect
import tempfile
from importlib import resources
from pathlib import Path

import matplotlib.pyplot as plt

import skipcal
from skipcal import load_model
from skipcal.compare.comparison import CompareConfig, run_compare
from skipcal.configs.run import ProfileConfig
from skipcal.plots.compare import curves_figure, plot_transfer
from skipcal.style import style

loaded = load_model(device="cpu")

# %% [markdown]
# ## Three texts
#
# Encyclopedic articles and web pages come with skipcal; a module of Python's standard library stands for
# code.

# %%
folder = tempfile.TemporaryDirectory()
texts = resources.files("skipcal.text") / "embedded"
code = Path(folder.name) / "code.txt"
code.write_text(inspect.getsource(argparse), encoding="utf-8")
files = {"encyclopedic": texts / "encyclopedic.txt", "web": texts / "web.txt", "code": code}

# %% [markdown]
# ## Three profiles
#
# Each from 6 windows of 40 tokens, with the statistics over the text itself (`mode="prefill"`), and with
# thresholds from the recorded cosines alone (`closed_loop_prompts=0`). Both save time. A profile to be used
# is made from the model's own continuations of more and longer prompts, with its thresholds tuned with
# skipping on: the defaults.

# %%
profiles = []
for name, path in files.items():
    config = ProfileConfig(
        mode="prefill",
        data_files=[f"{name}={path}"],
        prompts=6,
        prompt_tokens=40,
        warm_up_tokens=4,
        closed_loop_prompts=0,
    )
    profiles.append(f"{folder.name}/{name}.json")
    skipcal.calibrate_model(loaded, config).profile.save(profiles[-1])

# %% [markdown]
# ## Side by side
#
# `run_compare` is what `skipcal compare` runs. With text it also uses every profile on every text, at its
# operating point for a skip ratio of 0.1: 2 windows of 64 tokens, none of which shares a run of 16 tokens
# with the prompts of a profile. The last row of the perplexities is the full model's.

# %%
settings = CompareConfig(
    data_files=[f"{name}={path}" for name, path in files.items()],
    target_skip_ratio=0.1,
    prompts=2,
    prompt_tokens=8,
    text_tokens=64,
)
result = run_compare(profiles, settings, lambda: loaded)
print(result.to_text())

# %%
figure = curves_figure(result.profiles)
figure.set_dpi(80)

# %%
with style():
    figure, axes = plt.subplots(1, 2, figsize=(11, 2.9), layout="constrained", dpi=90)
    for value, ax in zip(("realised_skip_ratio", "perplexity"), axes, strict=True):
        plot_transfer(result.transfer, value=value, ax=ax)
folder.cleanup()

# %% [markdown]
# ## What to make of it
#
# - Look at the curves and the intervals first: where the regions differ by less than their intervals, the
#   data is not what decides.
# - A row whose realised ratios lie far apart has a threshold that means something else on each text.
#   Compare methods at the ratio that was realised, and state on which text.
# - Perplexities are to be read down a column, against the full model's on the same text: texts differ by
#   themselves.
# - If the text that the model will be used on is at hand, calibrate on that. If several kinds are, give
#   them together (`data_files` takes many): the profile then keeps statistics of each and pools them.
#
# With windows this few and this short, the figures show how to look, not what holds of the model.
