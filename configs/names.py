"""Names that options know, apart from the modules that give them a meaning: completing one is quick."""

from __future__ import annotations

from skipcal.errors import ConfigError, asking

ENGINES = ("auto", "eager", "graph", "recorded")
VLLM_ENGINE = "vllm"  # decodes what evaluate and sweep measure, many prompts at a time
DTYPES = ("auto", "bfloat16", "float16", "float32")
QUANTIZATIONS = ("bitsandbytes:int8", "bitsandbytes:nf4", "torchao:int8")
SURROGATES = "+surrogates"  # after the name of a method that chooses FFNs: surrogates stand in for them
FITTED = "static+fitted"  # a fixed set whose layers and surrogates were fitted together
DAMAGE = "ffn-skip+damage"  # the rule cosine with tolerances: layers weighed by what skipping them loses
METHODS = (
    "full",
    "ffn-skip",
    "gate",
    "random",
    "no-input-adaptive",
    "static",
    "shortgpt",
    "skipdecode",
    *(f"{name}{SURROGATES}" for name in ("ffn-skip", "random", "no-input-adaptive", "static")),
    FITTED,
    DAMAGE,
)


def check_engine(name: str, known: tuple[str, ...] = ENGINES) -> None:
    """Raise ConfigError for an unknown name."""
    if name not in known:
        raise ConfigError(asking(f"engine {name!r} is not one of {', '.join(known)}", name, known))
