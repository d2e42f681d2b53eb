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
# # Bring your own model
#
# What it takes to use skipcal on a model it has never seen: its FFN blocks are located and *proven*, a text
# is run, and out comes a profile. The models here are built on the spot with random weights, so every step
# is real and no number says anything about language.

# %%
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import skipcal
from skipcal import calibrate_model
from skipcal.arch.embedded import embedded_model_folder
from skipcal.arch.loading import LoadedModel
from skipcal.configs.run import ProfileConfig
from skipcal.style import style

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(embedded_model_folder())  # any tokenizer will do here
shape = {
    "vocab_size": len(tokenizer),
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": None,  # random text should not end by chance
}

# %% [markdown]
# ## A family from the table
#
# `h` is the residual stream that enters an FFN block, `f` what the block adds to it. `locate` knows by
# `config.model_type` which modules of a layer make `f`, and believes nothing: a few tokens are run, and in
# every layer `h + f` has to equal what the layer returns, element by element. `proof_error` is the largest
# deviation, relative to `|h| + |f|`.

# %%
qwen = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", head_dim=16, **shape)).eval()
found = skipcal.locate(qwen)
print(found.found, found.blocks[0].family.chain, f"proof error {found.proof_error:.2g}")

# %% [markdown]
# ## A family that no table knows
#
# A model with classes of its own has a `model_type` of its own. To have one here, a model of OLMo 2's
# classes is given a name of its own. Its norm stands *after* the FFN, so guessing by names known from Llama
# would go wrong. What is not in the table is read from the structure: the modules of a layer are watched in
# one pass, and of the runs that could be an FFN block, one has to pass the same proof.

# %%
config = AutoConfig.for_model("olmo2", **shape)
config.model_type = "in-house"
model = AutoModelForCausalLM.from_config(config).eval()
found = skipcal.locate(model)
print(found.found, found.blocks[0].family.chain, f"proof error {found.proof_error:.2g}")

# %% [markdown]
# A family can also be registered by hand, for this process. A wrong entry does no harm: what is not proven
# is not used.

# %%
skipcal.register_family("in-house", layers="model.layers", chain=("mlp", "post_feedforward_layernorm"))
found = skipcal.locate(model)
print(found.found, found.blocks[0].family.chain, f"proof error {found.proof_error:.2g}")

# %% [markdown]
# ## A profile
#
# `calibrate_model` takes a model, its tokenizer and the name that results shall have. A model that can be
# loaded by name comes as such from `skipcal.load_model("org/name")`. The model continues 8 prompts of the
# embedded text by 24 tokens; cosines are recorded there, the region is fitted to their mean, and thresholds
# are tuned with skipping on.

# %%
loaded = LoadedModel(model=model, tokenizer=tokenizer, name="in-house", revision=None)
settings = ProfileConfig(
    corpus=["embedded"],
    prompts=8,
    prompt_tokens=24,
    new_tokens=24,
    warm_up_tokens=4,
    closed_loop_prompts=2,
)
profile = calibrate_model(loaded, settings).profile
with style():
    figure, ax = plt.subplots(figsize=(7, 3.4), layout="constrained", dpi=90)
    skipcal.plot_saturation(profile, ax=ax)
for point in profile.operating_points[:5]:
    print(f"target {point.target_skip_ratio:.2f}: threshold {point.threshold:.4f}", end=", ")
    print(f"realised {point.realised_skip_ratio:.3f}")

# %% [markdown]
# ## Saved, loaded, used
#
# A profile is one JSON file. Loaded again it is the same profile, and it refuses a model of another shape.

# %%
folder = tempfile.TemporaryDirectory()
path = Path(folder.name) / "in-house.json"
profile.save(path)
again = skipcal.SkipProfile.load(path)
print("equal:", again == profile)
try:
    skipcal.skipping(qwen, again)
except skipcal.SkipcalError as error:
    print(f"{type(error).__name__}: {error}")

# %%
inputs = tokenizer("A river begins in the hills", return_tensors="pt")
with skipcal.skipping(model, again, target_skip_ratio=0.25) as run:
    model.generate(**inputs, max_new_tokens=40, do_sample=False)
print(f"skip ratio {run.report.skip_ratio:.3f} after the warm-up; engine {run.report.engine}")
print("skipped per layer:", *run.report.skipped_per_layer)

# %% [markdown]
# ## Shared
#
# `skipcal push` uploads the profile and writes a section of the model card; with `--dry-run` it prints what
# would go. In Python it is `profile.push_to_hub("me/in-house-skip")`.

# %%
push = [sys.executable, "-m", "skipcal.cli", "push", str(path), "me/in-house-skip", "--dry-run"]
done = subprocess.run(push, capture_output=True, text=True, check=True)
folder.cleanup()
print(done.stdout)
