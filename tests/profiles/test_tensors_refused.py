"""The file of tensors beside a profile, in all the ways it can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gated import random_gates, random_map, with_gate
from safetensors.torch import load, save
from tensor_files import FILE, SHIPPED, Change, damaged, first_nan, header_of, put, renamed

from skipcal.core.surrogates import Surrogates
from skipcal.errors import (
    ProfileError,
    ProfileMismatch,
    Unavailable,
)
from skipcal.profiles.schema import SkipProfile
from skipcal.profiles.tensors import FORMATS, GateTensors


def test_a_file_that_is_missing_names_itself_and_what_to_do(saved: Path) -> None:
    (saved.parent / FILE).unlink()
    profile = SkipProfile.load(saved)  # reading numbers needs no tensors
    with pytest.raises(Unavailable, match=rf"{FILE}, .* cannot be read .*skipcal fit"):
        profile.policy_for()


@pytest.mark.parametrize("change", ["flipped", "shorter", "empty", "longer"])
def test_a_file_that_is_not_the_named_one_is_refused(saved: Path, change: str) -> None:
    beside = saved.parent / FILE
    raw = bytearray(beside.read_bytes())
    if change == "flipped":
        raw[-1] ^= 1
    changed = {"flipped": raw, "shorter": raw[:-7], "empty": bytearray(), "longer": raw + b"\0"}[change]
    beside.write_bytes(changed)
    with pytest.raises(ProfileError, match="is not the file the profile was made with"):
        SkipProfile.load(saved).policy_for()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, h: h.pop("format"), r"format is None, expected 'skipcal\.surrogates/1'"),
        (lambda t, h: h.update(format="skipcal.surrogates/9"), "format is 'skipcal.surrogates/9'"),
        (lambda t, h: t.pop("gate.bias"), "expected tensors"),
        (lambda t, h: t.update(more=torch.zeros(1)), "expected tensors"),
        (put("surrogate.down", lambda t: t[0]), "surrogate.down has shape .* expected three axes"),
        (put("surrogate.up", lambda t: t.mT), "surrogate.up has shape"),
        (put("gate.layers", lambda t: t[:1]), "gate.layers has shape"),
        (put("gate.weight", lambda t: t[:, :-1]), "gate.weight has shape"),
        (put("gate.bias", first_nan), "gate.bias holds values that are not finite"),
        (put("surrogate.up", first_nan), "surrogate.up holds values that are not finite"),
        (put("surrogate.bias", lambda t: t + torch.inf), "surrogate.bias holds values"),
    ],
)
def test_contents_that_do_not_go_together_are_refused(
    gated: SkipProfile, change: Change, message: str
) -> None:
    with pytest.raises(ProfileError, match=message):
        GateTensors.unpack(damaged(gated, change), "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, h: t.pop("surrogate.up_scale"), "expected tensors"),
        (lambda t, h: t.pop("surrogate.route_bias"), "expected tensors"),
        (
            put("surrogate.route_bias", lambda t: t[:, :0]),
            r"has shape \[2, 0\], expected \[2, maps\]",
        ),
        (put("surrogate.route_bias", lambda t: t.repeat(1, 3)), "with fewer maps than the 7 rows"),
        (put("surrogate.route_bias", lambda t: t[:, :3]), "surrogate.up has shape"),
        (put("surrogate.up_scale", lambda t: t[:, :1]), "surrogate.up_scale has shape"),
        (put("surrogate.up_scale", first_nan), "surrogate.up_scale holds values that are not finite"),
        (put("surrogate.up", lambda t: t.float()), "surrogate.up is of type 'F32', expected I8"),
    ],
)
def test_several_maps_that_do_not_go_together_are_refused(change: Change, message: str) -> None:
    random = torch.Generator().manual_seed(3)
    maps = Surrogates({n: random_map(8, 3, 4, random) for n in (1, 4)})
    raw = GateTensors.pack(random_gates((1, 4), 8), maps, "f" * 64).raw
    tensors, header = load(raw), {"format": FORMATS[1], "model_fingerprint": "f" * 64}
    GateTensors.unpack(save(tensors, header), "here")
    change(tensors, header)
    with pytest.raises(ProfileError, match=message):
        GateTensors.unpack(save(tensors, header), "here")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x01",
        b"not safetensors at all, but long enough for a length",
        (2**60).to_bytes(8, "little") + b"{}",
        (200 * 2**20).to_bytes(8, "little") + b"{}",
        header_of(b"{"),
        header_of(b"[1, 2]"),
        header_of(b"1"),
        header_of(b'{"__metadata__": 3}'),
        header_of(b'{"__metadata__": {"format": 3}}'),
        header_of(b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}'),
        header_of(b'{"a": {"dtype": "X9", "shape": [0], "data_offsets": [0, 0]}}'),
        header_of(b'{"a":' * 3000 + b"1" + b"}" * 3000),
    ],
)
def test_bytes_that_are_no_safetensors_are_refused(raw: bytes) -> None:
    with pytest.raises(ProfileError, match="here is no file of surrogates"):
        GateTensors.unpack(raw, "here")


def test_a_foreign_safetensors_file_is_refused() -> None:
    with pytest.raises(ProfileError, match="format is 'pt'"):
        GateTensors.unpack(save({"lm_head.weight": torch.zeros(3)}, {"format": "pt"}), "here")


def test_gates_of_another_precision_are_read_as_float32(gated: SkipProfile) -> None:
    raw = damaged(gated, put("gate.weight", lambda t: t.bfloat16()))
    assert GateTensors.unpack(raw, "here").gates.weight.dtype == torch.float32


def test_tensors_of_other_weights_or_layers_are_refused(gated: SkipProfile, saved: Path) -> None:
    def other(tensors: Any, header: dict[str, str]) -> None:
        header["model_fingerprint"] = "0" * 64

    with pytest.raises(ProfileMismatch, match="fitted to another model"):
        renamed(saved, damaged(gated, other)).policy_for()
    with pytest.raises(ProfileMismatch, match=r"layers \[1, 2\], the profile's gate for \[1, 3\]"):
        renamed(saved, gated.tensors().raw, layers=[1, 3]).policy_for()
    narrow = with_gate(
        SHIPPED.model_copy(update={"model": SHIPPED.model.model_copy(update={"hidden_size": 8})})
    )
    with pytest.raises(ProfileMismatch, match="hidden size 8, the profile's 576"):
        renamed(saved, narrow.tensors().raw, layers=[1, 2]).policy_for()


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "a/b.safetensors", "a\\b.safetensors", "/etc/x.safetensors", "..", "",
     ".hidden.safetensors", "made.json", "made.safetensors\n", "x" * 300 + ".safetensors", 3, None],
)  # fmt: skip
@pytest.mark.parametrize("place", ["gate", "policy"])
def test_a_name_that_leads_elsewhere_is_refused(saved: Path, name: Any, place: str) -> None:
    document = json.loads(saved.read_text())
    document[place]["tensors"] = name
    saved.write_text(json.dumps(document))
    with pytest.raises(ProfileError, match=rf"{place}\.tensors"):
        SkipProfile.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("gate"), "gate: expected an entry beside a policy of the rule 'gate'"),
        (
            lambda d: d["gate"].update(sha256="0" * 64),
            "policy: expected the file of tensors that the gate names",
        ),
        (lambda d: d["gate"].update(sha256="Z"), "gate.sha256"),
        (
            lambda d: d["gate"].update(layers=[1, 30]),
            r"gate\.layers: expected layers below 30 .*, got \[1, 30\]",
        ),
        (lambda d: d["gate"].update(layers=[2, 1]), "ascending layers"),
        (lambda d: d["gate"].update(layers=[1, 1]), "ascending layers"),
        (lambda d: d["policy"].update(rule="oracle"), "policy: rule is not known"),
        (lambda d: d["policy"].update(cold_s=3), "policy.cold_s"),
        (lambda d: d["policy"].update(threshold="low"), "policy.threshold"),
        (lambda d: d["policy"].update(warm_up_tokens=-1), "policy.warm_up_tokens"),
        (lambda d: d["gate"]["operating_points"][0].update(realised_skip_ratio=2), "realised_skip_ratio"),
        (lambda d: d["gate"]["fit"].update(rank=0), "gate.fit.rank"),
    ],
)
def test_a_malformed_gate_names_the_field(saved: Path, change: Callable[[Any], Any], message: str) -> None:
    document = json.loads(saved.read_text())
    change(document)
    saved.write_text(json.dumps(document))
    with pytest.raises(ProfileError, match=message):
        SkipProfile.load(saved)
