"""Trains what the study declares in plan.py and is not in results.jsonl yet.

python benchmarks/study/run.py
python benchmarks/study/run.py --questions equal-0.3 best --tasks digits-mlp
python benchmarks/study/report.py                  # docs/results.md and its pictures
"""

from plan import CIFAR10, PLAN

if __name__ == "__main__":
    PLAN.main(__doc__, unasked=(CIFAR10.name,))
