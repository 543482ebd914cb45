"""The process that `simulate` starts: a request as JSON on standard input, the findings as JSON on standard output."""

import json
import sys
from contextlib import redirect_stdout

from dist_contrastive.cli import main_guard
from dist_contrastive.config import TrainConfig, from_dict
from dist_contrastive.methods import METHODS
from dist_contrastive.simulate.rank import simulate_here


def main() -> None:
    request = json.load(sys.stdin)
    config = request.pop("config")
    method = METHODS[config["method"]["name"]].Config
    with redirect_stdout(sys.stderr):  # whatever libraries print
        findings = simulate_here(from_dict(TrainConfig, config, method), **request)
    json.dump(findings.to_json(), sys.stdout)


if __name__ == "__main__":
    sys.exit(main_guard(main))
