"""Trains what the benchmark of cut networks declares in plan.py and is not in results.jsonl yet.

python benchmarks/pruning/run.py
python benchmarks/pruning/run.py --tasks fashion5k-resnet18                          # 40 minutes more on two cores
python benchmarks/pruning/run.py --tasks fashion-resnet18 --device cuda --workers 15
python benchmarks/pruning/report.py                # the tables of docs/pruning.md
"""

from plan import NARROW_RESNET, PLAN, RESNET

if __name__ == "__main__":
    PLAN.main(__doc__, unasked=(NARROW_RESNET.name, RESNET.name))
