"""Sets of FFNs that every token past the warm-up skips, as a profile's JSON holds them.

Their surrogates are in a file of tensors beside it, apart from those of a gate: they were fitted for other
tokens, and to another stream.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from skipcal.profiles.parts import CorpusInfo, Count, FileName, List, Part, Ratio, Sha256

SETS_SUFFIX = ".sets.safetensors"  # after the stem of the profile beside it


class FixedSet(Part):
    """One set, and what it costs.

    target_skip_ratio: what it was made for; len(layers) comes as close as a whole number can.
    excess_nll:        loss over the full model's, nats per token past the warm-up, teacher-forced over the
                       windows by which the layers were chosen, so a little on the low side.
    by_corpus:         the same of each corpus alone.
    """

    target_skip_ratio: Ratio
    layers: Annotated[List[Count], Field(min_length=1)]
    excess_nll: float
    by_corpus: dict[str, float]


class FixedSetsFit(Part):
    """How sets and surrogates were fitted.

    tried:           FFNs measured at each step, those of least predicted damage.
    surrogate_share: bytes of a surrogate over those of the FFN it stands in for.
    """

    corpora: List[CorpusInfo]
    windows: Count
    window_tokens: Count
    tokens: Count
    seed: int
    damage: str
    tried: Count
    rank: Annotated[int, Field(ge=1)]
    surrogate_share: float
    seconds: float
    peak_memory_bytes: Count
    config: dict[str, Any]


class FixedSets(Part):
    """The sets of a profile, by ascending ratio, and how they were made."""

    tensors: FileName
    sha256: Sha256
    warm_up_tokens: Count
    sets: Annotated[List[FixedSet], Field(min_length=1)]
    fit: FixedSetsFit
