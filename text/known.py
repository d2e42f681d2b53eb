"""Which corpora there are by name, and which text a name or a data file on the command line means."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from skipcal.errors import ConfigError, Unavailable, did_you_mean, suggestion
from skipcal.text.formats import DEFAULT_FORMAT, QUESTION_SETS, Format, format_named
from skipcal.text.local_files import COMPRESSIONS, RECORD_SUFFIXES, TEXT_SUFFIXES, ending, stem


@dataclass(frozen=True)
class Corpus:
    """Where a text is. `source` is a hub id, "embedded", or a path when `local`.

    questions, format: of a question set, which one and how its records become text; else None.
    """

    name: str
    source: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: str | None = None
    text_column: str = "text"
    stream: bool = False
    local: bool = False
    questions: str | None = None
    format: Format | None = None

    @property
    def has_text_column(self) -> bool:
        """Whether its text is a column of records, and no text file nor made from questions."""
        return not (self.source == "embedded" or (self.local and self.stream) or self.questions)


# Every set here is Parquet, JSON or text on the hub: `datasets` runs no loading scripts any more.
# Those without a revision are read at the commit they are at, which the profile records.
KNOWN_CORPORA = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            "wikitext",
            "Salesforce/wikitext",
            config="wikitext-2-raw-v1",
            revision="b08601e04326c79dfdd32d625aee71d232d685c3",
            stream=True,  # its records are lines
        ),
        Corpus(
            "c4",
            "allenai/c4",
            config="en",
            revision="1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
            data_files="en/c4-train.00000-of-01024.json.gz",  # listing all shards is slow and rate limited
        ),
        Corpus(
            "pile",
            "monology/pile-uncopyrighted",
            # The hub's own conversion to Parquet: the set's .zst files need one more library.
            revision="refs/convert/parquet",
            data_files="default/partial-train/0000.parquet",
        ),
        Corpus("embedded", "embedded", stream=True),
        Corpus("gsm8k", "openai/gsm8k", config="main", questions="gsm8k"),
        Corpus("svamp", "ChilleD/SVAMP", questions="svamp"),
        Corpus("mawps", "MU-NLPC/Calc-mawps", questions="mawps"),
        Corpus("anli_r1", "facebook/anli", split="train_r1", questions="anli_r1"),
        Corpus("anli_r3", "facebook/anli", split="train_r3", questions="anli_r3"),
        Corpus("commonsenseqa", "tau/commonsense_qa", questions="commonsenseqa"),
        Corpus("race", "ehovy/race", config="all", questions="race"),
        Corpus("winogrande", "allenai/winogrande", config="winogrande_m", questions="winogrande"),
        Corpus("strategyqa", "ChilleD/StrategyQA", questions="strategyqa"),
    )
}

# Known sets whose hub copies need a loading script, and the form in which a local copy is taken.
LOCAL_ONLY = {
    "esnli": "--data-files esnli:in-context=PATH.jsonl",
    "oscar": "--data-files oscar=PATH.jsonl",
    "redpajama": "--data-files redpajama=PATH.jsonl --text-column raw_content",
}


def resolve_corpora(
    names: Iterable[str], data_files: Iterable[str], *, text_column: str = "text"
) -> list[Corpus]:
    """Corpora by name and by local file.

    names:      a known corpus, a question set as SET or SET:FORMAT, or a hub id.
    data_files: PATH, NAME=PATH, or for records of a question set SET:FORMAT=PATH.
    Raises ConfigError for names that mean nothing or stand twice and for a text column of texts that have
    none, Unavailable for known sets that are not on the hub in a form that loads.
    """
    corpora = [replace(_named(name), text_column=text_column) for name in names]
    corpora += [replace(_local(entry), text_column=text_column) for entry in data_files]
    if text_column != "text" and not any(corpus.has_text_column for corpus in corpora):
        asked = ", ".join(corpus.name for corpus in corpora) or "no text at all"
        raise ConfigError(
            f"--text-column {text_column!r} has no effect on {asked}: it is for records of .jsonl, .parquet "
            "and the hub; leave it out"
        )
    repeated = {c.name for c in corpora if sum(c.name == other.name for other in corpora) > 1}
    if repeated or "pooled" in {c.name for c in corpora}:
        wrong = sorted(repeated) or ["pooled"]
        raise ConfigError(f"corpus name {wrong[0]!r} is taken; name data files apart with NAME=PATH")
    return corpora


def _named(name: str) -> Corpus:
    base, separator, wanted = name.partition(":")
    if base in QUESTION_SETS:
        format = format_named(wanted, name) if separator else DEFAULT_FORMAT
        QUESTION_SETS[base].check(format)
    elif separator:
        raise ConfigError(_no_questions(name, base))
    if base in LOCAL_ONLY:
        raise Unavailable(
            f"corpus {name!r}: the hub's copy needs a loading script, which no current `datasets` runs; "
            f"pass a local copy with {LOCAL_ONLY[base]}"
        )
    known = KNOWN_CORPORA.get(base, Corpus(name, name))
    return replace(known, name=name, format=format) if base in QUESTION_SETS else known


def _local(entry: str) -> Corpus:
    label, separator, path = entry.partition("=")
    if not separator or Path(entry).exists():
        label, path = stem(Path(entry)), entry
    suffix = ending(Path(path))
    if suffix not in (*TEXT_SUFFIXES, *RECORD_SUFFIXES):
        raise ConfigError(
            f"data file {path!r} has the ending {suffix!r}; expected .txt, .jsonl or .json, with "
            f"{', '.join(COMPRESSIONS)} after it or without, or .parquet"
        )
    corpus = Corpus(label, path, stream=suffix in TEXT_SUFFIXES, local=True)
    base, separator, wanted = label.partition(":")
    if not separator:
        return corpus
    if base not in QUESTION_SETS:
        if base in KNOWN_CORPORA or base in LOCAL_ONLY:
            raise ConfigError(_no_questions(label, base))
        return corpus  # a name with a colon in it
    if corpus.stream:
        raise ConfigError(f"data file {path!r} is no table of questions; expected .jsonl, .json or .parquet")
    format = format_named(wanted, label)
    QUESTION_SETS[base].check(format)
    return replace(corpus, questions=base, format=format)


def likely(name: str) -> str:
    """A question to the user where a name resembles a known corpus, else nothing."""
    known = [*KNOWN_CORPORA, *QUESTION_SETS]
    question = "" if name in known else did_you_mean(name, known)
    return question and f"{question} else "


def _no_questions(label: str, base: str) -> str:
    if base in KNOWN_CORPORA or base in LOCAL_ONLY:
        return f"corpus {label!r}: {base!r} is running text and has no formats; give it as {base}"
    return f"corpus {label!r}: {base!r} is no question set; {suggestion(base, sorted(QUESTION_SETS))}"
