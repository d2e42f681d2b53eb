"""What a threshold realises, by how the loop was closed: a table from finished profiles.

    skipcal profile --data-files wikitext=wikitext2_raw_valid.txt --data-files c4=c4.jsonl --verify \\
        --closed-loop teacher-forced -o forced.json      about 8 minutes on two cores
    skipcal profile ... --closed-loop decode -o decoded.json      about 25 minutes
    python benchmarks/closed_loop.py forced.json decoded.json
"""

from __future__ import annotations

import argparse
import sys

from common import save

from skipcal.profiles.schema import SkipProfile


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("profiles", nargs="+", metavar="PROFILE")
    profiles = [SkipProfile.load(path) for path in parser.parse_args().profiles]
    rows = [
        {
            "closed_loop": profile.calibration.closed_loop,
            "model": profile.model.name,
            "corpora": [corpus.model_dump() for corpus in profile.calibration.corpora],
            "policy_without_threshold": {
                "cold_s": profile.cosine_policy.cold_s,
                "cold_e": profile.cosine_policy.cold_e,
                "max_skips": profile.cosine_policy.max_skips,
                "warm_up_tokens": profile.cosine_policy.warm_up_tokens,
            },
            "points": [point.model_dump() for point in profile.operating_points],
            "config": profile.config,
            "environment": profile.environment.model_dump(),
        }
        for profile in profiles
    ]
    save("closed_loop", f"python {' '.join(sys.argv)}", {"profiles": rows})


if __name__ == "__main__":
    main()
