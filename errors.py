"""What can go wrong, and the exit code of the command line for each.

SkipcalError              1  failed at run time
├── ConfigError           2  an option, a value or a configuration file is wrong
│   ├── OutputExists      2  the output is there already and may not be replaced
│   └── TargetOutOfReach  2  no threshold skips that much
├── ProfileError          3  the file is not a profile
│   └── ProfileMismatch   3  the profile belongs to another model
├── Unavailable           4  a model or a text cannot be had
├── JudgeError            5  a judge endpoint cannot be used
├── UnsupportedModel      1  no FFN blocks were found, or they are not what was claimed
├── OutputError           1  a result cannot be written
├── SessionError          1  skipping was asked for where it cannot be done right
├── ProcessFailed         1  one of several processes failed at its share of the work
└── ProcessLost           1  another process of the run is gone

Every message is one line: what was given, what was expected, what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class SkipcalError(Exception):
    """Base of every error that skipcal raises on purpose."""

    exit_code = 1


class ConfigError(SkipcalError, ValueError):
    """An option, a value or a configuration file is wrong."""

    exit_code = 2


class OutputExists(ConfigError):
    """The output is there already and may not be replaced."""


class TargetOutOfReach(ConfigError):
    """No threshold reaches the skip ratio asked for."""


class ProfileError(SkipcalError, ValueError):
    """The file is not a profile, or is damaged."""

    exit_code = 3


class ProfileMismatch(ProfileError):
    """The profile was made for another model."""


class Unavailable(SkipcalError):
    """A model or a text cannot be had: no such file, no network, not readable as text."""

    exit_code = 4


class JudgeError(SkipcalError):
    """A judge endpoint cannot be used: no key, not reachable, or it refuses the requests."""

    exit_code = 5


class UnsupportedModel(SkipcalError):
    """The FFN blocks of a model were not found, or fail the numerical proof."""


class OutputError(SkipcalError):
    """A result cannot be written."""


class SessionError(SkipcalError):
    """Skipping was asked for in a situation where it could not be done right."""


class ProcessFailed(SkipcalError):
    """One of several processes failed at its share of the work."""


class ProcessLost(SkipcalError):
    """Another process of the run is gone."""


def first_words(error: BaseException, limit: int = 200) -> str:
    """A foreign error's text in one line of at most `limit` characters."""
    words = " ".join(str(error).split())
    return words if len(words) <= limit else words[:limit] + " ..."


def suggestion(name: str, known: Sequence[str]) -> str:
    """What to say of an unknown name: the one that was likely meant, else all there are."""
    return did_you_mean(name, known) or f"known: {', '.join(known)}"


def asking(said: str, name: str, known: Sequence[str]) -> str:
    """What was said of a name, and `did_you_mean` after it."""
    return "; ".join(filter(None, (said, did_you_mean(name, known))))


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The one of the known names that was likely meant, as a question; nothing where none resembles it."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else ""
