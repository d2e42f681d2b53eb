"""Profiles come from anyone: they are data, they are bounded, and nothing in them leads elsewhere."""

from __future__ import annotations

import ast
import json
import logging
import os
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from documents import document, gate_document, write
from gated import with_gate
from mutations import Mutator
from safetensors.torch import load, save

from skipcal.errors import ProfileError, SkipcalError, Unavailable
from skipcal.files.reading import MAX_PROFILE_BYTES, MAX_STRUCTURE
from skipcal.profiles.schema import SkipProfile
from skipcal.profiles.sources import PROFILE_FILE
from skipcal.profiles.summary import summarize
from skipcal.profiles.tensor_file import MAX_HEADER_BYTES
from skipcal.profiles.tensors import FORMATS, GateTensors, most_bytes

ROOT = Path(__file__).resolve().parents[2]
TENSORS = "made.surrogates.safetensors"

# No code


CODE_CARRIERS = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
LOADERS = {("numpy", "load"), ("np", "load"), ("torch", "load"), ("yaml", "load"), ("yaml", "unsafe_load")}


def carries_code(source: str) -> list[str]:
    """What in a module reads files that may run something."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in CODE_CARRIERS]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in CODE_CARRIERS:
            found.append(str(node.module))
        elif isinstance(node, ast.Name) and node.id in ("eval", "exec", "__import__"):
            found.append(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in LOADERS:
                found.append(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append("allow_pickle")
    return found


# What is compiled there is written from the calls a model made: names, and literals as repr writes them.
WRITES_ITS_OWN = {str(ROOT / "runtime" / "engines" / "recording.py"): ["exec"]}


def test_nothing_in_the_package_reads_code_from_data() -> None:
    folders = ("", *(path.parent.name for path in ROOT.glob("*/__init__.py")))
    modules = [path for folder in folders for path in (ROOT / folder).glob("**/*.py" if folder else "*.py")]
    assert len(modules) > 100
    assert {str(path): found for path in modules if (found := carries_code(path.read_text()))} == (
        WRITES_ITS_OWN
    )


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from joblib import load", "torch.load('x')", "yaml.load(x)", "eval('1')", "exec(x)",
     "np.load(x)", "f(x, allow_pickle=True)", "from pickle import loads", "__import__('x')"],
)  # fmt: skip
def test_the_check_for_code_sees_it(line: str) -> None:
    assert carries_code(line)
    assert not carries_code("model.eval(); json.load(f); yaml.safe_load(f); safetensors.torch.load(b)")


# Bounds


def bomb(**changes: Any) -> bytes:
    return json.dumps({**document(), **changes}).encode()


def in_mean(entries: str) -> bytes:
    """The document with something else in the list layers.pooled.mean."""
    return json.dumps(document()).replace('"mean": [0.5, 0.5, 0.5, 0.5]', f'"mean": [{entries}]').encode()


def with_number(spelling: str) -> bytes:
    """A number where any value may stand."""
    return json.dumps({**document(), "config": {"a": "N"}}).replace('"N"', spelling).encode()


BOMBS: dict[str, tuple[bytes, str]] = {
    "many wrong entries": (in_mean('"a",' * 2_000_000 + "1"), r"layers\.pooled\.mean\.0: Input should be"),
    "many entries": (in_mean("0.5," * 2_000_000 + "1"), "expected lists of one length"),
    "many lists": (bomb(more=[[]] * 200_000), f"more than {MAX_STRUCTURE:,} entries"),
    "many keys": (bomb(more={str(n): 0 for n in range(200_000)}), f"more than {MAX_STRUCTURE:,} entries"),
    "many unknown keys": (
        json.dumps({**document(), "regions": {str(n): 0 for n in range(80_000)}}).encode(),
        r"regions\.\w+: Field required, got .*and 80\d\d\d more",
    ),
    "many corpora, each wrong": (
        bomb(layers={str(n): {"mean": ["a"] * 4000} for n in range(800)}),
        r"layers\.0: expected an entry 'count'",
    ),
    "a large section": (
        bomb(model={"x": ["a"] * 500_000}),
        "expected less than 1 MiB in all sections but layers",
    ),
    "a key twice among many": (
        b"{" + b",".join(b'"%d":0' % n for n in range(90_000)) + b',"7":1}',
        "the key '7' is there twice",
    ),
    "deep lists": (b"[" * 90_000, "no valid JSON"),
    "deep objects": (b'{"a":' * 40_000 + b"1" + b"}" * 40_000, "no valid JSON"),
    "rather deep": (bomb(more=json.loads("[" * 300 + "]" * 300)), "recursion limit exceeded"),
    "a long number": (
        bomb(config={"a": 1}).replace(b'"a": 1', b'"a": ' + b"9" * 1_000_000),
        "no 64-bit integer",
    ),
    "a large number": (
        bomb(config={"a": 1}).replace(b'"a": 1', b'"a": 9223372036854775808'),
        "no 64-bit int",
    ),
    "infinity": (bomb(config={"a": 1}).replace(b'"a": 1', b'"a": 1e999'), "'1e999' is no finite number"),
    "long infinity": (
        bomb(config={"a": 1}).replace(b'"a": 1', b'"a": ' + b"9" * 400 + b".0"),
        "no finite number",
    ),
    "minus infinity": (bomb(config={"a": 1}).replace(b'"a": 1', b'"a": -1E+400'), "no finite number"),
    "NaN": (bomb(config={"a": 1}).replace(b'"a": 1', b'"a": NaN'), "NaN is not a number in JSON"),
    "a long string": (bomb(format="x" * 5_000_000), "format is 'xxx"),
    "a long key": (bomb(policy={"k" * 500_000: 1}), r"policy\.\w+"),
    "too long": (b" " * (MAX_PROFILE_BYTES + 1), "larger than 16 MiB"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_one_short_line_and_soon(tmp_path: Path, name: str) -> None:
    raw, message = BOMBS[name]
    (tmp_path / "bomb.json").write_bytes(raw)
    begun = time.process_time()
    with pytest.raises(ProfileError, match=message) as refused:
        SkipProfile.load(tmp_path / "bomb.json")
    assert time.process_time() - begun < 20  # seconds; a quadratic scan would take hours
    assert len(str(refused.value)) < 800 and str(refused.value).isprintable()


def test_what_a_terminal_would_obey_is_not_printed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    evil = "\x1b]0;owned\x07\u202ereversed\x9b2J"
    made = document(**{evil: 1})
    made["model"]["name"] = evil
    made["regions"]["warnings"] = [evil + "\nnext"]
    with caplog.at_level(logging.WARNING):
        profile = SkipProfile.load(write(tmp_path / "evil.json", made))
    for text in (summarize(profile), profile.model_card(), caplog.messages[0]):
        assert all(c.isprintable() or c == "\n" for c in text)
        assert "owned" in text
    made["regions"][evil] = 1
    with pytest.raises(ProfileError) as refused:
        SkipProfile.load(write(tmp_path / "evil.json", made))
    assert str(refused.value).isprintable() and "owned" in str(refused.value)


def test_text_of_a_profile_is_no_markup_in_a_card(tmp_path: Path) -> None:
    made = document()
    made["regions"]["warnings"] = [
        "![seen](http://x/y.png) [here](http://x) <script> | `code` <!-- end of skipcal profile --> &lt; \\"
    ]
    made["model"]["name"] = 'a"b/c```$(rm -rf ~)'
    card = SkipProfile.load(write(tmp_path / "p.json", made)).model_card()
    assert r"!\[seen]\(http://x/y.png) [here]\(http://x) &lt;script> \| \`code\` &lt;!-- end" in card
    assert "&amp;lt; \\\\" in card
    assert "--model 'a\"b/c` ` `$(rm -rf ~)'" in card
    assert card.count("\n```") == 6


# Tensors


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    with_gate(SkipProfile.load(write(tmp_path / "plain.json", document()))).save(tmp_path / "made.json")
    return tmp_path / "made.json"


def test_a_link_is_followed_and_what_it_leads_to_is_checked(saved: Path, tmp_path: Path) -> None:
    """All files in the hub's cache are links. A profile cannot make one."""
    (tmp_path / "elsewhere").mkdir()
    kept = (saved.parent / TENSORS).rename(tmp_path / "elsewhere" / "blob")
    (saved.parent / TENSORS).symlink_to(kept)
    assert SkipProfile.load(saved).tensors().gates.layers == (1, 2)
    kept.write_bytes(b"something else")
    with pytest.raises(ProfileError, match="is not the file the profile was made with"):
        SkipProfile.load(saved).tensors()


@pytest.mark.parametrize("kind", ["pipe", "endless", "folder", "huge"])
def test_what_never_ends_is_not_read(saved: Path, kind: str) -> None:
    beside = saved.parent / TENSORS
    beside.unlink()
    if kind == "pipe":
        os.mkfifo(beside)
    elif kind == "endless":
        beside.symlink_to("/dev/zero")
    elif kind == "folder":
        beside.mkdir()
    else:
        with beside.open("wb") as file:
            file.truncate(2**40)  # a terabyte that takes no room
    expected = (
        "not a regular file" if kind != "huge" else r"more than the [\d,]+ bytes that the profile's layers"
    )
    with pytest.raises(ProfileError, match=expected):
        SkipProfile.load(saved).tensors()


def test_a_pipe_is_no_profile(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / PROFILE_FILE)
    with pytest.raises(Unavailable):
        SkipProfile.load(tmp_path / PROFILE_FILE)
    with pytest.raises(Unavailable):
        SkipProfile.load(tmp_path)


def test_the_size_of_tensors_follows_from_the_profile(saved: Path) -> None:
    size = (saved.parent / TENSORS).stat().st_size
    assert (
        size
        <= most_bytes(layers=2, rank=2, hidden=32, maps=1)
        <= size + MAX_HEADER_BYTES + 8 * 2 * (4 * 32 + 2 * 32 + 3)
    )
    lying = gate_document()
    lying["gate"]["fit"]["rank"] = 33
    with pytest.raises(
        ProfileError, match=r"gate\.fit\.rank: expected at most 32 \(model\.hidden_size\), got 33"
    ):
        SkipProfile.load(write(saved.parent / "lying.json", lying))


def packed(header: dict[str, Any], rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def test_damaged_tensors_are_valid_or_refused(saved: Path) -> None:
    """800 files: of the header's structure, and of bytes anywhere."""
    raw = (saved.parent / TENSORS).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = Mutator(json.loads(raw[8:end]))
    outcomes: dict[str, int] = {"valid": 0, "refused": 0}
    for n in range(800):
        random = Random(f"tensors {n}")
        if n % 2:
            told, damaged = header.structural(random)
            damage = packed(damaged, raw[end:])
        else:
            told, place = "bytes", random.randrange(end + 64)
            damage = random.choice(
                [
                    raw[:place],
                    raw[:place] + bytes([raw[place] ^ (1 << random.randrange(8))]) + raw[place + 1 :],
                    raw[:place] + random.randbytes(3) + raw[place:],
                    random.choice([0, 1, 7, end, 2**20, 2**40, 2**63]).to_bytes(8, "little") + raw[8:],
                    raw + bytes(place),
                ]
            )
        try:
            found = GateTensors.unpack(damage, "here")
        except ProfileError as error:
            message = str(error)
            assert message.startswith("here") and message.isprintable() and len(message) < 800, (
                f"{n} {told}: {message}"
            )
            outcomes["refused"] += 1
            continue
        assert found.gates.weight.shape == (len(found.gates.layers), 32), f"{n} {told}"
        assert torch.isfinite(found.gates.weight).all(), f"{n} {told}"
        outcomes["valid"] += 1
    assert outcomes["refused"] > 400 and outcomes["valid"] > 5, outcomes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [2**40, 32]}, r"gate\.weight has shape \[1099511627776, 32\], expected a list of sizes"),
        ({"shape": [-1, 32]}, "expected a list of sizes"),
        ({"shape": [True, 32]}, "expected a list of sizes"),
        ({"shape": "2x32"}, "expected a list of sizes"),
        ({"dtype": "I64"}, r"gate\.weight is of type 'I64', expected F32 or BF16 or F16"),
        ({"dtype": "F64"}, "expected F32 or BF16 or F16"),
        ({"data_offsets": [0, 10**15]}, "is no file of surrogates"),
        ({"data_offsets": [0, 0]}, "is no file of surrogates"),
        ({"data_offsets": [100, 10]}, "is no file of surrogates"),
    ],
)
def test_a_header_that_lies_is_refused(saved: Path, change: dict[str, Any], message: str) -> None:
    raw = (saved.parent / TENSORS).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    header["gate.weight"].update(change)
    with pytest.raises(ProfileError, match=message):
        GateTensors.unpack(packed(header, raw[end:]), "here")


def test_a_long_header_is_not_parsed(saved: Path) -> None:
    tensors = load((saved.parent / TENSORS).read_bytes())
    raw = save(tensors, {"format": FORMATS[0], "more": "x" * MAX_HEADER_BYTES})
    with pytest.raises(ProfileError, match=f"is longer than {MAX_HEADER_BYTES:,}"):
        GateTensors.unpack(raw, "here")


def test_layers_of_tensors_ascend(saved: Path) -> None:
    tensors = load((saved.parent / TENSORS).read_bytes())
    for layers in ([2, 1], [1, 1], [-1, 1]):
        tensors["gate.layers"] = torch.tensor(layers)
        with pytest.raises(ProfileError, match=r"gate\.layers holds .*, expected ascending layers"):
            GateTensors.unpack(save(tensors, {"format": FORMATS[0]}), "here")


def test_errors_of_profiles_are_all_of_one_kind() -> None:
    assert issubclass(ProfileError, SkipcalError) and ProfileError.exit_code == 3
