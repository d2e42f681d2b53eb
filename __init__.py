"""skipcal: find the FFN blocks a token does not need, and decode without them.

Public names are imported on first use, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from skipcal.quiet import remarks_off
from skipcal.version import __version__ as __version__

if TYPE_CHECKING:
    from skipcal.arch.families import register_family as register_family
    from skipcal.arch.loading import load_model as load_model
    from skipcal.arch.locate import locate as locate
    from skipcal.calibrate.capture import capture as capture
    from skipcal.calibrate.pipeline import calibrate_model as calibrate_model
    from skipcal.configs.run import ProfileConfig as ProfileConfig
    from skipcal.configs.sweep import SweepConfig as SweepConfig
    from skipcal.core.policy import SkipPolicy as SkipPolicy
    from skipcal.core.report import SkipReport as SkipReport
    from skipcal.errors import SkipcalError as SkipcalError
    from skipcal.evaluation.sweep import run_sweep as run_sweep
    from skipcal.evaluation.token_map import TokenMap as TokenMap
    from skipcal.evaluation.token_map import token_map as token_map
    from skipcal.plots.sweep import plot_quality as plot_quality
    from skipcal.profiles.curve import plot_saturation as plot_saturation
    from skipcal.profiles.methods import Ask as Ask
    from skipcal.profiles.methods import make_policy as make_policy
    from skipcal.profiles.schema import SkipProfile as SkipProfile
    from skipcal.report.page import write_report as write_report
    from skipcal.runtime.session import skipping as skipping


_HOMES = {
    "Ask": "skipcal.profiles.methods",
    "ProfileConfig": "skipcal.configs.run",
    "SkipPolicy": "skipcal.core.policy",
    "SkipProfile": "skipcal.profiles.schema",
    "SkipReport": "skipcal.core.report",
    "SkipcalError": "skipcal.errors",
    "SweepConfig": "skipcal.configs.sweep",
    "TokenMap": "skipcal.evaluation.token_map",
    "calibrate_model": "skipcal.calibrate.pipeline",
    "capture": "skipcal.calibrate.capture",
    "load_model": "skipcal.arch.loading",
    "locate": "skipcal.arch.locate",
    "make_policy": "skipcal.profiles.methods",
    "plot_quality": "skipcal.plots.sweep",
    "plot_saturation": "skipcal.profiles.curve",
    "register_family": "skipcal.arch.families",
    "run_sweep": "skipcal.evaluation.sweep",
    "skipping": "skipcal.runtime.session",
    "token_map": "skipcal.evaluation.token_map",
    "write_report": "skipcal.report.page",
}

__all__ = [
    "Ask",
    "ProfileConfig",
    "SkipPolicy",
    "SkipProfile",
    "SkipReport",
    "SkipcalError",
    "SweepConfig",
    "TokenMap",
    "calibrate_model",
    "capture",
    "load_model",
    "locate",
    "make_policy",
    "plot_quality",
    "plot_saturation",
    "register_family",
    "run_sweep",
    "skipping",
    "token_map",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'skipcal' has no attribute {name!r}")
    with remarks_off():
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
