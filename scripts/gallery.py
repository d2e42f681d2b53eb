"""The gallery: profiles/README.md, a table of the profiles that are shipped.

After a profile is added or made again: python scripts/gallery.py
"""

from __future__ import annotations

from pathlib import Path

from skipcal.files.markdown import escaped, table
from skipcal.files.writing import write_text_atomic
from skipcal.profiles.schema import SkipProfile
from skipcal.profiles.sources import shipped_profiles
from skipcal.profiles.summary import ranges

PAGE = Path(__file__).resolve().parents[1] / "profiles" / "README.md"
_HEAD = """\
# Shipped profiles

Each is used by its name, as in `skipcal show NAME` or `skipcal generate --profile NAME --prompt TEXT`. How to
share one of your own is told in [docs/sharing.md](../docs/sharing.md).
"""
_TAIL = """\
Region: layers whose FFNs the rule `cosine` may skip. Ratios: skip ratios of the first and the last operating
point, as fractions of all FFN blocks; realised, or predicted where none was measured. This page is made by
`python scripts/gallery.py`; changes by hand are lost.
"""


def gallery() -> str:
    """The page, in Markdown."""
    head = ["name", "model", "layers", "region", "ratios", "gate", "calibration text", "made with"]
    rows = [_row(name, SkipProfile.load(name)) for name in shipped_profiles()]
    return f"{_HEAD}\n{table(head, rows)}\n\n{_TAIL}"


def _row(name: str, profile: SkipProfile) -> list[str]:
    model, policy, gate = profile.model, profile.cosine_policy, profile.gate
    gated = "no"
    if gate is not None:
        reach = _range([point.realised_skip_ratio for point in gate.operating_points])
        gated = f"layers {ranges(gate.layers)}, {reach}"
    cosine = [(p.realised_skip_ratio, p.predicted_skip_ratio) for p in profile.operating_points]
    texts = (f"{c.name} ({c.tokens:,} tokens)" for c in profile.calibration.corpora)
    return [
        f"`{name}`",
        f"{escaped(model.name)}, {escaped(model.dtype)}",
        str(model.num_layers),
        f"{policy.cold_s} to {policy.cold_e - 1}" if policy.cold_s < policy.cold_e else "none",
        _range([predicted if realised is None else realised for realised, predicted in cosine]),
        gated,
        escaped(", ".join(texts)),
        f"skipcal {escaped(profile.environment.skipcal)}, transformers "
        f"{escaped(profile.environment.transformers)}",
    ]


def _range(ratios: list[float]) -> str:
    return f"{ratios[0]:.2f} to {ratios[-1]:.2f}" if ratios else "-"


if __name__ == "__main__":
    write_text_atomic(PAGE, gallery(), overwrite=True)
