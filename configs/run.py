"""Run configurations: what a YAML file may say, and how the command line wins over it."""

from __future__ import annotations

import re
from collections.abc import Collection
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from skipcal.configs.names import ENGINES, VLLM_ENGINE, check_engine
from skipcal.configs.paths import at_home
from skipcal.core.policy import DEFAULT_WARM_UP_TOKENS
from skipcal.errors import ConfigError, asking, suggestion

Config = TypeVar("Config", bound=BaseModel)
PositiveInt = Annotated[int, Field(ge=1)]
DEFAULT_CORPORA = ["wikitext", "c4"]


def _known_engine(name: str) -> str:
    check_engine(name)
    return name


def _known_host(name: str) -> str:
    check_engine(name, (*ENGINES, VLLM_ENGINE))
    return name


EngineName = Annotated[str, AfterValidator(_known_engine)]
HostName = Annotated[str, AfterValidator(_known_host)]


class ModelSettings(BaseModel):
    """Which model, and how it is loaded: the arguments of `load_model`.

    model:      hub id, local folder or GGUF file; None is the model of the profile that a command takes,
                where it takes none the embedded one.
    max_memory: entries such as 0=20GiB and cpu=48GiB.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    model: str | None = None
    revision: str | None = None
    adapter: str | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    quantization: str | None = None
    device: str | None = None
    device_map: str | None = None
    max_memory: list[str] | None = None
    offload_folder: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False


class CalibrationSettings(ModelSettings):
    """A model, the text it is given, and where the result goes.

    corpus: known corpora or hub ids. Without any, and without data_files, a named model gets WikiText and
            C4, the embedded model the embedded text.
    """

    _places: ClassVar[frozenset[str]] = frozenset({"output", "overwrite"})  # decide no number

    corpus: list[str] = []
    data_files: list[str] = []
    text_column: str = "text"
    output: str | None = None
    overwrite: bool = False

    def corpora(self) -> list[str]:
        """Names of the corpora to use, with the defaults filled in."""
        if self.corpus or self.data_files:
            return self.corpus
        return DEFAULT_CORPORA if self.model else ["embedded"]

    def recorded(self) -> dict[str, Any]:
        """What a profile keeps of it: all that decides numbers, no places on this computer."""
        kept = self.model_dump(mode="json", exclude=set(self._places))
        kept["corpus"] = self.corpora()
        kept["data_files"] = [without_folder(entry) for entry in self.data_files]
        return without_places(kept)


class ProfileConfig(CalibrationSettings):
    """Everything that decides the result of `skipcal profile`.

    chat_template: prompts are messages in the model's chat template; it counts to `prompt_tokens`.
    prompts:   per corpus. prompt_tokens and new_tokens: of each prompt and its continuation.
    closed_loop: how realised skip ratios are measured. "teacher-forced": over the calibration text,
               fast and comparable. "decode": over what the policy itself writes, which is what
               generation will see; slower by an order of magnitude.
    closed_loop_prompts: per corpus, over which they are measured; 0 for not at all.
    by_damage: also measure, on the same text, what skipping each FFN alone loses, and find operating points
               of the rule that weighs layers by it.
    """

    _places: ClassVar[frozenset[str]] = frozenset({"output", "overwrite", "trace"})

    mode: Literal["generate", "prefill"] = "generate"
    chat_template: bool = False
    prompts: PositiveInt = 32
    prompt_tokens: Annotated[int, Field(ge=2)] = 64
    new_tokens: PositiveInt = 128
    batch_size: PositiveInt = 16
    seed: Annotated[int, Field(ge=0)] = 0
    target_skip_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    warm_up_tokens: Annotated[int, Field(ge=0)] = DEFAULT_WARM_UP_TOKENS
    max_skips: PositiveInt | None = None
    cold_s: PositiveInt | None = None
    cold_e: PositiveInt | None = None
    closed_loop: Literal["teacher-forced", "decode"] = "teacher-forced"
    closed_loop_prompts: Annotated[int, Field(ge=0)] = 16
    by_damage: bool = False
    verify: bool = False
    verify_prompts: PositiveInt = 16
    trace: str | None = None

    @model_validator(mode="after")
    def _options_fit_together(self) -> Self:
        if (self.cold_s is None) != (self.cold_e is None):
            raise ValueError("cold_s and cold_e belong together; give both --cold-s and --cold-e, or neither")
        if self.by_damage and not self.closed_loop_prompts:
            raise ValueError(
                "by_damage is measured on closed_loop_prompts, and there are none; give 1 or more"
            )
        if self.closed_loop == "decode" and self.mode == "prefill":
            raise ValueError("closed_loop decode needs generated text; it does not go with mode prefill")
        if self.chat_template and self.mode == "prefill":
            raise ValueError("chat_template has no effect on mode prefill; leave it out, or measure answers")
        decoded = (
            self.new_tokens if self.mode == "generate" else self.prompt_tokens - 1
        ) - self.warm_up_tokens
        if decoded < 1:
            raise ValueError(
                f"no token lies past the warm-up of {self.warm_up_tokens}; raise --new-tokens (in mode "
                "prefill --prompt-tokens) or lower --warm-up-tokens"
            )
        if self.trace is not None and self.trace == self.output:
            raise ValueError(f"trace and output are both {self.trace!r}; give them different files")
        return self


def load_config(path: Path | None, options: dict[str, Any]) -> ProfileConfig:
    """The file's settings with `options` over them.

    Options that are None or empty sequences count as not given.
    Raises ConfigError for a file that cannot be read, unknown keys and values out of range.
    """
    return load_settings(ProfileConfig, path, options)


def load_settings(kind: type[Config], path: Path | None, options: dict[str, Any]) -> Config:
    """The settings of any kind from a file and options; see `load_config`."""
    settings = read_yaml(path) if path else {}
    given = given_options(options)
    return validated(kind, {**settings, **given}, given, path)


def given_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given: neither None nor an empty sequence."""
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    return {name: value for name, value in listed.items() if value is not None and value != []}


def validated(
    kind: type[Config], settings: dict[str, Any], given: Collection[str], path: Path | None
) -> Config:
    """Settings as a configuration of `kind`; `given` are those that came from the command line.

    Raises ConfigError that names the option, or the key of the file at `path`.
    """
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(_explain(kind, error, given, path)) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a YAML file, or of a shipped one by its name.

    Raises ConfigError for a file that cannot be read or is no mapping.
    """
    shipped = resources.files("skipcal.configs") / f"{path}.yaml"
    # A folder does not hide a shipped name: the results of a configuration often lie in one called alike.
    file = shipped if not path.is_file() and path.name == str(path) and shipped.is_file() else path
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        hint = suggestion(str(path), shipped_configs())
        raise ConfigError(
            f"configuration {path} cannot be read ({error.strerror}) and is no shipped one ({hint})"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration {path} is no YAML: {' '.join(str(error).split())}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise ConfigError(f"configuration {path}: expected `key: value` lines, see skipcal profile --help")
    expanded: dict[str, Any] = at_home("", settings)
    return expanded


def shipped_configs() -> list[str]:
    """Names of the configurations that come with skipcal."""
    files = resources.files("skipcal.configs").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def _explain(kind: type[BaseModel], error: ValidationError, given: Collection[str], path: Path | None) -> str:
    faults = error.errors(include_url=False)
    # An unknown key first: it is the likeliest reason for the others.
    first = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    place = [part for part in first["loc"] if isinstance(part, str)]
    if first["type"] == "extra_forbidden":
        return _unknown_key(_fields(kind, place[:-1]), ".".join(place), path)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":  # options that do not fit together
        return message if len(place) < 2 else f"{'.'.join(place)}: {message}"
    key = place[-1]
    shown = f"configuration {path}: {'.'.join(place)}" if path else ".".join(place)
    where = f"--{key.replace('_', '-')}" if key in given else shown
    if first["type"] == "missing":
        return f"{where} is missing; give it as --{key.replace('_', '-')} or in a --config file"
    return f"{where} {first['input']!r} cannot be used: {_expected(first, message)}"


_LIMITS = {"ge": "{} or more", "gt": "more than {}", "le": "at most {}", "lt": "less than {}"}


def _expected(fault: Any, message: str) -> str:
    """What a value had to be, in our words."""
    limits = fault.get("ctx", {})
    for key, words in _LIMITS.items():
        if key in limits:
            return f"expected {words.format(format(limits[key], 'g'))}"
    expected = message.replace("Input should be", "expected")
    names = re.findall(r"'([^']*)'", str(limits.get("expected", "")))
    return asking(expected, str(fault["input"]), names)


def _unknown_key(known: Collection[str], key: str, path: Path | None) -> str:
    hint = suggestion(key.rpartition(".")[2], sorted(known))
    return f"configuration {path}: unknown key {key!r}; {hint}" if path else f"unknown key {key!r}; {hint}"


def _fields(kind: type[BaseModel], place: list[str]) -> Collection[str]:
    """Names of the fields at a place inside nested settings."""
    for name in place:
        annotation = kind.model_fields[name].annotation
        inner = next((a for a in (annotation, *get_args(annotation)) if _is_settings(a)), None)
        if inner is None:
            return []
        kind = inner
    return kind.model_fields


def _is_settings(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def without_places(settings: dict[str, Any]) -> dict[str, Any]:
    """Recorded settings: of what lies on this computer the name, and no folder for its weights."""
    kept = {name: value for name, value in settings.items() if name != "offload_folder"}
    for name in ("model", "adapter", "profile"):
        if kept.get(name) is not None and Path(kept[name]).exists():
            kept[name] = Path(kept[name]).name
    return kept


def without_folder(entry: str) -> str:
    """A --data-files entry without the place on this computer: [NAME=]PATH with the file's name."""
    label, separator, path = entry.partition("=")
    return f"{label}={Path(path).name}" if separator and not Path(entry).exists() else Path(entry).name
