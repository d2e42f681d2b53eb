"""What is used of lm-eval (EleutherAI/lm-evaluation-harness), an optional dependency.

Importing this module imports lm-eval, which takes seconds; only what runs its tasks does it.
"""

from skipcal.errors import ConfigError, first_words

try:
    from lm_eval import __version__ as harness_version
    from lm_eval import evaluator
    from lm_eval.api import metrics as aggregations
    from lm_eval.api.model import hash_args
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    missing = (error.name or "").partition(".")[0]
    why = "is not installed" if missing == "lm_eval" else f"cannot be imported ({first_words(error)})"
    raise ConfigError(f'lm-eval {why}; install it with: pip install "skipcal[eval]"') from error

__all__ = ["HFLM", "TaskManager", "aggregations", "evaluator", "harness_version", "hash_args"]
