"""A model divided over two processes: capture, decisions and text are those of the whole one."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from warm_python import environment

from skipcal.arch.loading import LoadedModel

SCRIPT = """
import json, os, sys, torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import skipcal
from skipcal.arch.loading import fingerprint
from skipcal.calibrate.capture import capture
from skipcal.core.policy import SkipPolicy

IDS = torch.randint(3, 97, (3, 20), generator=torch.Generator().manual_seed(0))
POLICY = SkipPolicy(cold_s=1, cold_e=7, threshold=0.7, warm_up_tokens=2)

@torch.no_grad()
def seen(model):
    with capture(model) as recorder:
        model(IDS)
    cosine = recorder.take()[0]
    with skipcal.skipping(model, policy=POLICY, teacher_forced=True, prompt_tokens=4) as forced:
        logits = model(IDS, use_cache=False).logits
    with skipcal.skipping(model, policy=POLICY) as decoded:
        prompts = {"input_ids": IDS[:, :4], "attention_mask": torch.ones(3, 4, dtype=torch.long)}
        text = model.generate(**prompts, max_new_tokens=12, do_sample=False)
    return {
        "cosine": cosine.tolist(), "logits": logits.tolist(), "text": text.tolist(),
        "forced": forced.report.skipped_per_layer, "decoded": decoded.report.skipped_per_layer,
        "fingerprint": fingerprint(model),
    }

whole = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
sharded = AutoModelForCausalLM.from_pretrained(
    "model", dtype=torch.float32, distributed_config=DistributedConfig(tp_plan="auto")
)
weight = sharded.model.layers[0].mlp.gate_proj.weight
local = weight.to_local() if hasattr(weight, "to_local") else weight
found = {"whole": seen(whole), "sharded": seen(sharded), "rows_here": local.shape[0]}
with open(f"rank{os.environ['RANK']}.json", "w") as file:
    json.dump(found | {"processes": dist.get_world_size()}, file)
dist.destroy_process_group()
"""


def test_two_processes_with_half_the_weights_each_decide_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worded: LoadedModel, warm: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model: Any = worded.model
    model.save_pretrained("model")
    Path("script.py").write_text(SCRIPT)
    done = subprocess.run(
        [warm, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"],
        capture_output=True, text=True, check=False, timeout=600, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ranks = [json.loads(Path(f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for found in ranks:
        assert found["processes"] == 2
        assert found["rows_here"] == model.config.intermediate_size // 2
        whole, sharded = found["whole"], found["sharded"]
        np.testing.assert_allclose(sharded["cosine"], whole["cosine"], atol=1e-5)
        np.testing.assert_allclose(sharded["logits"], whole["logits"], atol=1e-4)
        for name in ("forced", "decoded", "text", "fingerprint"):
            assert sharded[name] == whole[name]
        assert 0 < sum(sharded["forced"]) < 3 * 14 * 5  # some, and not all that can be
        assert 0 < sum(sharded["decoded"]) < 3 * 9 * 5
    for name in ("cosine", "forced", "decoded", "text"):  # to the bit: unlike decisions would never end
        assert ranks[0]["sharded"][name] == ranks[1]["sharded"][name]
