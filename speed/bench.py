"""`skipcal bench`: the full model against skipping at forced ratios.

The rule is the paper's, or a gate with its surrogates (skipcal.speed.forced). A ratio
between two whole numbers of layers is the mean of both. Each arm is set against two bases: its own full
twin (the same session and engine, asked about no layer), which tells what skipping gains, and plain
`generate()`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from skipcal.arch.blocks import context_tokens
from skipcal.arch.loading import LoadedModel, load_model
from skipcal.arch.locate import Architecture, input_device, locate
from skipcal.arch.placement import pick_device
from skipcal.configs.bench import BenchConfig
from skipcal.configs.fit import SURROGATE_BUDGET
from skipcal.configs.run import ModelSettings
from skipcal.core.surrogates import rank_for
from skipcal.errors import ConfigError
from skipcal.profiles.schema import SkipProfile
from skipcal.speed.arms import FULL, Bench, Run, endless_greedy, random_prompt
from skipcal.speed.compared import Compared, break_even_of, wanted_engine
from skipcal.speed.cost import ForcedRatio, forced_ratio, step_bytes
from skipcal.speed.files import BENCH_FORMAT
from skipcal.speed.forced import Forced, ForcedCosine, ForcedGate, random_gate
from skipcal.speed.hardware import copy_bandwidth, environment, peak_memory, told_of_memory
from skipcal.speed.shapes import random_model, shape_config
from skipcal.speed.timing import Spread, interleave

RANDOM_WEIGHTS = "random weights: speed only, no quality"


@dataclass(frozen=True)
class Subject:
    """The model that is measured. random_weights: it is a shape; profile: whose gate decides, if any does."""

    model: Any
    name: str
    random_weights: bool
    profile: SkipProfile | None = None
    adapter: str | None = None
    quantization: str | None = None


def load_subject(
    config: BenchConfig, load: Callable[[Mapping[str, Any]], LoadedModel] | None = None
) -> Subject:
    """The model of the configuration, or its shape filled with random weights.

    load: how a command loads the model by its settings; by default `load_model` does.
    Raises ConfigError for a profile without a gate, before a model is loaded.
    """
    profile = None
    if config.profile is not None:
        profile = SkipProfile.load(config.profile)
        profile.gate_policy(0.0)
    if config.shape is None:
        names = BenchConfig.model_fields.keys() & ModelSettings.model_fields
        settings = {name: getattr(config, name) for name in names}
        loaded = load(settings) if load else load_model(settings.pop("model"), **settings)
        found = loaded.described()
        return Subject(
            loaded.model,
            found["name"],
            random_weights=False,
            profile=profile,
            adapter=found["adapter"],
            quantization=found["quantization"],
        )
    device = pick_device(config.device)
    by_device = torch.bfloat16 if device.type == "cuda" else torch.float32
    with told_of_memory(f"weights of shape {config.shape!r}"):
        model = random_model(
            config.shape,
            device=device,
            dtype=by_device if config.dtype == "auto" else getattr(torch, config.dtype),
            seed=config.seed,
            attn_implementation=config.attn_implementation,
        )
    return Subject(model, config.shape, random_weights=True)


def check_shape(config: BenchConfig) -> None:
    """Raise before a model is made: for an unknown shape, a ratio or a context it cannot have."""
    if config.shape is not None:
        known = shape_config(config.shape)
        layers = known.num_hidden_layers
        gate = random_gate(layers, known.hidden_size, rank=1, seed=config.seed)
        _check_fits(config, known, layers, ForcedGate(gate, layers) if config.gated else ForcedCosine(layers))


@torch.no_grad()
def run_bench(config: BenchConfig, subject: Subject, *, time_limit_s: float | None = None) -> dict[str, Any]:
    """Measure every batch size with every context length: a document of format skipcal.bench/1.

    time_limit_s: fewer rounds than asked for where they would take longer; each case has at least one.
    Raises TargetOutOfReach for a ratio the model cannot have, SkipcalError when memory runs out.
    """
    model = subject.model
    architecture = locate(model)
    forced = forced_by(config, subject, architecture)
    _check_fits(config, model.config.get_text_config(), architecture.num_layers, forced)
    device = input_device(model)
    bandwidth = copy_bandwidth(device, rounds=config.rounds)
    sizes = [(batch, context) for batch in config.batch_size for context in config.context_tokens]
    share = None if time_limit_s is None else time_limit_s / len(sizes)
    cases = []
    with endless_greedy(model):
        for batch, context in sizes:
            ids = random_prompt(model, batch_size=batch, tokens=context, seed=config.seed)
            bench = Bench(model, architecture, ids, config.new_tokens, config.engine, forced)
            cases.append(_case(config, bench, bandwidth, share))
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "format": BENCH_FORMAT,
        "model": {
            "name": subject.name,
            "random_weights": subject.random_weights,
            "adapter": subject.adapter,
            "quantization": subject.quantization,
            "model_type": architecture.model_type,
            "num_layers": architecture.num_layers,
            "hidden_size": architecture.hidden_size,
            "intermediate_size": architecture.intermediate_size,
            "parameters": parameters,
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "note": RANDOM_WEIGHTS if subject.random_weights else None,
        "settings": config.recorded(),
        "copy_gb_per_s": bandwidth.to_dict(),
        "cases": cases,
        "peers": _peers_said(config, device),
        "peak_memory": peak_memory(device),
        "environment": environment(device),
    }


def forced_by(config: BenchConfig, subject: Subject, architecture: Architecture) -> Forced:
    """The rule that is measured. Raises ProfileMismatch for another model's profile."""
    layers, hidden = architecture.num_layers, architecture.hidden_size
    if subject.profile is not None:
        subject.profile.check_fits(subject.model)
        return ForcedGate(subject.profile.gate_policy(0.0), layers)
    if not config.gated:
        return ForcedCosine(layers)
    block = architecture.blocks[1]
    rank = rank_for(SURROGATE_BUDGET, hidden, block.weight_bytes, subject.model.dtype.itemsize)
    return ForcedGate(random_gate(layers, hidden, rank=rank, seed=config.seed), layers)


def _case(config: BenchConfig, bench: Bench, bandwidth: Spread, time_limit_s: float | None) -> dict[str, Any]:
    """One batch size with one context length."""
    batch_size, context_tokens = bench.ids.shape
    forced = _forced_ratios(config, bench.architecture.num_layers, bench.forced)
    skips = sorted({count for ratio in forced for count, _ in ratio.counts})
    arms = bench.arms(skips, peers=config.peers)
    with (
        told_of_memory(f"{batch_size} rows of {context_tokens + config.new_tokens} tokens"),
        tqdm(
            total=len(arms) * (config.rounds + 1),
            desc=f"batch {batch_size}, context {context_tokens}",
            disable=None,
        ) as bar,
    ):
        runs = interleave(_counted(arms, bar), config.rounds, time_limit_s=time_limit_s)
    # Step s reads the prompt, s tokens before it and its own.
    mean_tokens = context_tokens + config.new_tokens / 2
    read = step_bytes(bench.model, bench.architecture, batch_size=batch_size, tokens=mean_tokens)
    engine = wanted_engine(config.engine, bench.ids.device.type, runs)
    compared = Compared(runs, read, bandwidth, batch_size, engine)
    rows = [compared.row(name, ((name, 1.0),)) for name in arms if not name.startswith("skip-")]
    rows += [compared.skipping_row(ratio) for ratio in forced]
    ratio, reason = break_even_of(rows)
    return {
        "batch_size": batch_size,
        "context_tokens": context_tokens,
        "new_tokens": config.new_tokens,
        "rounds": len(runs[FULL]),
        "weight_bytes_per_step": read.weights,
        "kv_cache_bytes_per_step": read.kv_cache,
        "arms": rows,
        "break_even": {"skip_ratio": ratio, "reason": reason},
    }


def _counted(arms: dict[str, Callable[[], Run]], bar: Any) -> dict[str, Callable[[], Run]]:
    def counted(run: Callable[[], Run]) -> Callable[[], Run]:
        def timed() -> Run:
            done = run()
            bar.update()
            return done

        return timed

    return {name: counted(run) for name, run in arms.items()}


def _forced_ratios(config: BenchConfig, num_layers: int, forced: Forced) -> list[ForcedRatio]:
    return [forced_ratio(r, num_layers, most=forced.most, limit=forced.limit) for r in config.ratios]


def _check_fits(config: BenchConfig, model_config: Any, num_layers: int, forced: Forced) -> None:
    _forced_ratios(config, num_layers, forced)
    longest = max(config.context_tokens) + config.new_tokens
    room = context_tokens(model_config)
    if room is not None and longest > room:
        raise ConfigError(
            f"--context-tokens {max(config.context_tokens)} and {config.new_tokens} new tokens do not fit "
            f"the model's context of {room}; give at most --context-tokens {room - config.new_tokens}"
        )


def _peers_said(config: BenchConfig, device: torch.device) -> str | None:
    """Which peers were measured or left out, and why."""
    if not config.peers:
        return None
    if device.type == "cuda":
        return "hf-static-compiled: generate(cache_implementation='static'), which transformers compiles"
    return f"left out: transformers compiles the static cache's step on a GPU, not on a {device.type}"
