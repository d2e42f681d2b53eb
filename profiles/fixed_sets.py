"""Sets of FFNs that every token past the warm-up skips, as a profile's JSON holds them.

Their surrogates are in a file of tensors beside it, apart from those of a gate: they were fitted for other
tokens, and to another stream.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from skipcal.profiles.parts import Count, FileName, Fit, List, Part, Ratio, Sha256

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


class FixedSetsFit(Fit):
    """How sets and surrogates were fitted.

    tried: FFNs measured at each step, those of least predicted damage.
    """

    tried: Count


class FixedSets(Part):
    """The sets of a profile, by ascending ratio, and how they were made."""

    tensors: FileName
    sha256: Sha256
    warm_up_tokens: Count
    sets: Annotated[List[FixedSet], Field(min_length=1)]
    fit: FixedSetsFit
