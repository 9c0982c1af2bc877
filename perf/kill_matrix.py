"""Kill every kind of job at many moments; count what the same command did not mend by itself.

    python perf/kill_matrix.py --kills 200 --seed 0
    python perf/kill_matrix.py --kills 6 --scenarios ddp,zero

The harness of tests/kill at length: file operations of every kind, half-written files, moments of the clock. Two
kills before each run to the end. Every figure but the kills must be 0.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

MATRIX = Path(__file__).parents[1] / "tests/kill/matrix.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--scenarios", help="names in tests/kill/scenarios.py, joined by commas; default: all")
    chosen = parser.parse_args()
    command = [sys.executable, str(MATRIX), "--kills", str(chosen.kills), "--seed", chosen.seed]
    command += ["--scenarios", chosen.scenarios] if chosen.scenarios else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    cases = result.pop("cases")
    for case in cases:
        print(case["scenario"], "; ".join(case["points"]))
    print(json.dumps(result))
    wrong = ("half_written", "different", "left_over", "failed")
    raise SystemExit(any(result[what] for what in wrong))


if __name__ == "__main__":
    main()
