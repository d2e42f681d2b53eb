"""What a profile says of its own making: which model, which text, on what."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from skipcal.arch.loading import LoadedModel, fingerprint
from skipcal.arch.locate import Architecture, input_device
from skipcal.calibrate.saturation import Trace
from skipcal.configs.run import ProfileConfig
from skipcal.profiles.parts import CorpusInfo, Environment, ModelInfo
from skipcal.runtime.greedy import final_ids
from skipcal.text.corpora import CorpusSample
from skipcal.version import __version__


def model_info(loaded: LoadedModel, architecture: Architecture, *, trust_remote_code: bool) -> ModelInfo:
    """The model as it was loaded; a folder gives its name, not its place."""
    found = loaded.described()
    found["trust_remote_code"] |= trust_remote_code
    return ModelInfo(
        **found,
        model_type=architecture.model_type,
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.intermediate_size,
        fingerprint=fingerprint(loaded.model),
    )


def corpus_info(sample: CorpusSample, trace: Trace) -> CorpusInfo:
    """Where a sample came from and how much of it was traced."""
    return sample_info(sample, trace.tokens)


def sample_info(sample: CorpusSample, tokens: int) -> CorpusInfo:
    """Where a sample came from and how many of its tokens were counted."""
    corpus = sample.corpus
    return CorpusInfo(
        name=corpus.name,
        source=corpus.source,
        config=corpus.config,
        split=None if corpus.local or corpus.source == "embedded" else corpus.split,
        revision=corpus.revision,
        sha256=sample.sha256,
        format=corpus.format,
        documents=sample.documents,
        short_documents=sample.short_documents,
        prompts=len(sample.prompts),
        tokens=tokens,
        opening=sample.opening,
        joined_by=sample.joined_by,
    )


def what_decides(
    loaded: LoadedModel, architecture: Architecture, config: ProfileConfig, samples: Sequence[CorpusSample]
) -> dict[str, Any]:
    """All that decides the numbers of a calibration, as plain values: a run that differs is another run."""
    rows = [[sample.prompts, sample.held_out] for sample in samples]
    return {
        "config": config.recorded(),
        "model": model_info(loaded, architecture, trust_remote_code=config.trust_remote_code).model_dump(),
        # The fingerprint looks at a few values of each tensor; files that were replaced show here.
        "model_files": _files(Path(loaded.name)),
        "attention": str(loaded.model.config._attn_implementation),
        "end_of_sequence": sorted(final_ids(loaded.model.generation_config)),
        "device": input_device(architecture.stack).type,
        "text_sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        "versions": [__version__, torch.__version__, transformers.__version__],
    }


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of each file of a model folder; of a hub id nothing, for its commit is known."""
    if not folder.is_dir():
        return []
    found = ((path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file())
    return [(name, state.st_size, state.st_mtime_ns) for name, state in found]


def environment(architecture: Architecture, *, started: float | None, processes: int) -> Environment:
    """Versions, device and time.

    started:   when the run began, on `time.monotonic`; None where what it took is not known.
    processes: how many ran it.
    """
    device = input_device(architecture.stack)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return Environment(
        skipcal=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        device=f"{device.type} ({name})",
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=None if started is None else round(time.monotonic() - started, 1),
        processes=processes,
    )
