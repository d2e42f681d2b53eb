"""The gallery tells what is shipped."""

from __future__ import annotations

import runpy

from conftest import ROOT

from skipcal.profiles.schema import SkipProfile
from skipcal.profiles.sources import shipped_profiles

SCRIPT = runpy.run_path(str(ROOT / "scripts" / "gallery.py"))
gallery, PAGE = SCRIPT["gallery"], SCRIPT["PAGE"]


def test_the_gallery_is_up_to_date() -> None:
    """If not: python scripts/gallery.py"""
    assert PAGE.read_text(encoding="utf-8") == gallery()


def test_every_shipped_profile_has_its_row() -> None:
    rows = [line for line in gallery().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == shipped_profiles()
    for row, name in zip(rows, shipped_profiles(), strict=True):
        profile = SkipProfile.load(name)
        assert profile.model.name in row and f"| {profile.model.num_layers} |" in row
        first, last = profile.operating_points[0], profile.operating_points[-1]
        assert f"| {first.realised_skip_ratio:.2f} to {last.realised_skip_ratio:.2f} |" in row
        assert ("| no |" in row) == (profile.gate is None)
