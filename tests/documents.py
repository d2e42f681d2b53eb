"""Small valid profiles, as their files have them: of every rule, with every section."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LAYERS = 4
SHA256 = "ab" * 32
TENSORS = "tiny.surrogates.safetensors"


def statistics(layers: int = LAYERS) -> dict[str, Any]:
    return {
        "count": [10] * layers,
        "histogram": [[10, *[0] * 199]] * layers,
        "block_influence": [0.1 * (n + 1) for n in range(layers)],
        **{key: [0.5] * layers for key in ("mean", "min", "q05", "q25", "q50", "q75", "q95")},
        **{key: [0.1] * layers for key in ("std", "norm_ratio_mean")},
    }


def document(layers: int = LAYERS, **changes: Any) -> dict[str, Any]:
    """By the rule `cosine`."""
    point = {"predicted_skip_ratio": 0.1, "realised_skip_ratio": 0.1, "verified_skip_ratio": None}
    return {
        "format": "skipcal.profile/1",
        "model": {
            "name": "org/tiny", "revision": None, "model_type": "llama", "num_layers": layers,
            "hidden_size": 32, "intermediate_size": 48, "dtype": "float32", "quantization": None,
            "fingerprint": "0" * 64, "trust_remote_code": False,
        },
        "calibration": {
            "mode": "generate", "corpora": [], "prompt_tokens": 8, "new_tokens": 8, "seed": 0,
            "chat_template": False, "closed_loop": "teacher-forced",
        },
        "layers": {"pooled": statistics(layers)},
        "regions": {
            "cold_s": 1, "cold_e": layers - 1, "method": "isotonic", "fit_r2": 0.9, "monotonicity": None,
            "cold_s_interval": [1, 1], "cold_e_interval": [layers - 2, layers - 1], "warnings": [],
        },
        "policy": {
            "rule": "cosine", "cold_s": 1, "cold_e": layers - 1, "threshold": 0.9, "warm_up_tokens": 25,
            "max_skips": None,
        },
        "operating_points": [
            {"target_skip_ratio": 0.05, "threshold": 0.95, **point},
            {"target_skip_ratio": 0.1, "threshold": 0.9, **point},
            {"target_skip_ratio": 0.2, "threshold": 0.8, **point},
        ],
        "environment": {
            "skipcal": "0", "python": "3", "torch": "2", "transformers": "5", "device": "cpu",
            "created_at": "2026-01-01T00:00:00+00:00",
        },
        "config": {"prompts": 2},
        **changes,
    }  # fmt: skip


def corpus(name: str = "text") -> dict[str, Any]:
    return {
        "name": name, "source": f"{name}.txt", "config": None, "split": None, "revision": None,
        "sha256": SHA256, "documents": 1, "short_documents": 0, "prompts": 2, "tokens": 20,
    }  # fmt: skip


def gate_document(**changes: Any) -> dict[str, Any]:
    """With a gate as the policy. Its tensors are not there."""
    found = document(**changes)
    points = [
        {
            "target_skip_ratio": target, "threshold": threshold, "predicted_skip_ratio": target,
            "realised_skip_ratio": target, "by_corpus": {"text": target},
        }
        for target, threshold in ((0.1, -2.0), (0.2, -1.0), (0.4, 0.5))
    ]  # fmt: skip
    found["gate"] = {
        "tensors": TENSORS, "sha256": SHA256, "layers": [1, 2], "warm_up_tokens": 3,
        "operating_points": points,
        "fit": {
            "corpora": [corpus()], "windows": 4, "window_tokens": 16, "tokens": 52, "seed": 0,
            "sweeps": [0.0, 0.2], "damage": "fisher", "rank": 2, "surrogate_share": 0.03,
            "gate_r_squared": [0.5, 0.75], "surrogate_error": [0.4, 0.625], "seconds": 1.0,
            "peak_memory_bytes": 10**9, "config": {},
        },
    }  # fmt: skip
    found["paper_policy"] = found["policy"]
    found["policy"] = {
        "rule": "gate", "threshold": -1.0, "warm_up_tokens": 3, "tensors": TENSORS, "sha256": SHA256,
    }  # fmt: skip
    return found


def tuned_document(**changes: Any) -> dict[str, Any]:
    """With a fixed set of FFNs that a search chose, and no gate."""
    found = document(**changes)
    point = {
        "line": "static", "rule": "static", "threshold": None, "max_skips": None, "warm_up_tokens": 2,
        "skip_ratio": 0.25, "skip_ratio_all": 0.2, "kl": 0.125, "kl_low": 0.1, "kl_high": 0.15,
        "excess_nll": 0.1, "excess_nll_low": 0.05, "excess_nll_high": 0.2, "ideal_speed_up": 1.1,
        "on_front": True, "loses_to_random": False,
    }  # fmt: skip
    found["tuning"] = {
        "budget": {"max_kl": 0.5, "max_perplexity_increase": None, "min_speedup": None},
        "text": {"corpora": ["text"]}, "windows": 4, "points": [point], "chosen": 0, "config": {},
    }  # fmt: skip
    found["paper_policy"] = found["policy"]
    found["policy"] = {"rule": "static", "layers": [1], "warm_up_tokens": 2, "surrogates": False}
    return found


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path
