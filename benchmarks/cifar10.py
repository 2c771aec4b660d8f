"""A Bayesian network against the deterministic one, trained alike: means over seeds.

    python benchmarks/cifar10.py --data PATH [--seeds 5] [--epochs 10] [-- arguments of train]

Each seed is one run of ``python -m fastbconv train``: other first weights, another order of images,
other noise; the split is the same. Figures are those of the clean test images, which nothing was
chosen on. A seed whose report is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

NETWORKS = ("bayesian", "deterministic")
FIGURES = ("accuracy", "nll", "calibration_error", "entropy", "auroc_noise")
NOISE = ("0", "0.1", "0.2")  # standard deviation on the test images; white is 1


def run(seed: int, arguments: argparse.Namespace, rest: list[str]) -> dict:
    """The report of one seed, trained if it is not there."""
    folder = arguments.out / f"seed-{seed}"
    report = folder / "report.json"
    if not report.exists():
        command = [sys.executable, "-m", "fastbconv", "train", "--data", str(arguments.data)]
        command += ["--networks", *NETWORKS, "--epochs", str(arguments.epochs)]
        command += ["--seed", str(seed), "--out", str(folder), *rest]
        resume = (folder / "settings.json").exists()
        subprocess.run([*command, "--resume"] if resume else command, check=True)
    return json.loads(report.read_text())


def summarise(reports: list[dict]) -> dict[str, dict[str, dict[str, tuple[float, float]]]]:
    """noise -> network -> figure -> (mean, standard error of the mean)."""
    return {noise: {name: _row(reports, name, noise) for name in NETWORKS} for noise in NOISE}


def _row(reports: list[dict], name: str, noise: str) -> dict[str, tuple[float, float]]:
    row = {}
    for figure in FIGURES:
        values = [report["networks"][name]["test"][noise][figure] for report in reports]
        if None in values:  # clean images are not told from clean ones
            continue
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        row[figure] = (statistics.fmean(values), error)
    return row


def main() -> None:
    """Trains what is missing, prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10-seeds"))
    parser.add_argument("--json", type=Path, help="where the table is written")
    arguments, rest = parser.parse_known_args()
    rest = [argument for argument in rest if argument != "--"]
    reports = [run(seed, arguments, rest) for seed in range(arguments.seeds)]
    table = summarise(reports)
    print(f"| noise | network | {' | '.join(FIGURES)} |")
    print("|---" * (len(FIGURES) + 2) + "|")
    for noise, rows in table.items():
        for name, row in rows.items():
            cells = ["{:.4f} ± {:.4f}".format(*row[f]) if f in row else "-" for f in FIGURES]
            print(f"| {noise} | {name} | {' | '.join(cells)} |")
    if arguments.json is not None:
        content = {
            "settings": reports[0]["settings"] | {"seed": list(range(arguments.seeds))},
            "environment": reports[0]["environment"],
            "table": table,
            "runs": [
                {name: report["networks"][name]["test"] for name in NETWORKS} for report in reports
            ],
        }
        content["settings"].pop("data")
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
