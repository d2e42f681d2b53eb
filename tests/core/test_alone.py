"""The core needs torch and nothing else: another host than transformers can ask its rules."""

from __future__ import annotations

import subprocess
import sys

# A decode step of three layers by hand: the host hands over h and f, and obeys the mask.
ASKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"transformers", "datasets", "pandas", "accelerate", "pydantic"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())

import pkgutil, torch, skipcal.core
from importlib import import_module

for module in pkgutil.iter_modules(skipcal.core.__path__):
    import_module(f"skipcal.core.{module.name}")

from skipcal.core.host import PassTokens
from skipcal.core.policy import SkipPolicy

rule = SkipPolicy(cold_s=0, cold_e=3, threshold=0.9, max_skips=1).make_rule()
state = rule.start(PassTokens(active=torch.ones(2, dtype=torch.bool)), torch.device("cpu"))
h = torch.eye(2)
f = torch.tensor([[1.0, 0.0], [5.0, 0.0]])  # the first token's FFN adds along it, the second's across
asked = []
for layer in range(3):
    skip, state = rule.before(layer, state, h)
    asked.append(skip.tolist())
    state = rule.after(layer, state, h, f, ~skip)
print(asked)
"""


def test_a_rule_is_asked_with_torch_alone() -> None:
    done = subprocess.run([sys.executable, "-c", ASKED], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout == "[[False, False], [True, False], [False, False]]\n"
