"""What a profile says of its own making: which model, which text, on what."""

from __future__ import annotations

import platform
from datetime import UTC, datetime

import torch
import transformers

import skipcal
from skipcal.arch.loading import LoadedModel, fingerprint
from skipcal.arch.locate import Architecture, input_device
from skipcal.calibrate.corpora import CorpusSample
from skipcal.calibrate.saturation import Trace
from skipcal.profiles.parts import CorpusInfo, Environment, ModelInfo


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
    return sample_info(sample, len(trace.cosine))


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
    )


def environment(architecture: Architecture) -> Environment:
    """Versions, device and time."""
    device = input_device(architecture.stack)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return Environment(
        skipcal=skipcal.__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        device=f"{device.type} ({name})",
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
