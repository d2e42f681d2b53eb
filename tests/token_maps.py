"""Token maps that no model made."""

from __future__ import annotations

import numpy as np

from skipcal.core.report import SkipReport
from skipcal.evaluation.token_map import TokenMap

PIECES = ("<s>", "a $x^", " <b>&\"'", "\n", "", "🦊", " ", "\x00\t|", "$")


def made_map(pieces: tuple[str, ...] = PIECES, layers: int = 5) -> TokenMap:
    """Nobody's map: a prompt of 2, a warm-up of 1."""
    random = np.random.default_rng(0)
    skipped = random.random((len(pieces), layers)) < 0.5
    skipped[:3], skipped[:, [0, layers - 1]], skipped[3, 1:-1] = False, False, True
    report = SkipReport(
        decode_steps=len(pieces) - 2,
        decode_steps_after_warm_up=len(pieces) - 3,
        skipped_per_layer=tuple(skipped.sum(0).tolist()),
        weight_bytes_saved=0,
        engine="eager",
        engine_reason="made",
        method="ffn-skip",
        unit="ffn",
        byte_shares=(0.0,) * layers,
    )
    return TokenMap(
        pieces=pieces,
        ids=tuple(range(len(pieces))),
        cosine=random.uniform(0.5, 1, (len(pieces), layers)).astype(np.float32),
        skipped=skipped,
        layers=tuple(range(1, layers - 1)),
        most_skips=layers - 2,
        prompt_tokens=2,
        warm_up_tokens=1,
        report=report,
    )
