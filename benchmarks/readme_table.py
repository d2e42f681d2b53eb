"""Tables of the README, made from results/*.json: between <!-- speed: NAME --> and <!-- end speed -->.

python benchmarks/readme_table.py            write them
python benchmarks/readme_table.py --check    only say whether they are up to date
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from common import RESULTS

from skipcal.speed.files import load_result
from skipcal.speed.table import to_markdown

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"(<!-- speed: (?P<name>[\w.-]+) -->\n).*?(<!-- end speed -->)", re.S)


def updated(text: str, results: Path) -> str:
    """The text with every block made anew. A result that is not there yet is said to be missing."""

    def table(block: re.Match[str]) -> str:
        path = results / f"{block['name']}.json"
        script = f"`python benchmarks/{block['name'].rpartition('_')[0]}.py`"
        body = to_markdown(load_result(path)) if path.exists() else f"Not measured yet: {script}."
        return f"{block[1]}\n{body}\n\n{block[3]}"

    return BLOCK.sub(table, text)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something is old")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    old = options.readme.read_text(encoding="utf-8")
    new = updated(old, options.results)
    if options.check and new != old:
        sys.exit(f"{options.readme.name} is not up to date; run python benchmarks/readme_table.py")
    if new != old:
        options.readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
