"""Trains what the benchmark declares in plan.py and is not in results.jsonl yet.

python benchmarks/tiny_sparse/run.py
python benchmarks/tiny_sparse/run.py --questions mnist1d-mlp-0.9 mnist1d-mlp-0.95
python benchmarks/tiny_sparse/report.py            # docs/tiny_sparse.md and its picture
"""

from plan import PLAN

if __name__ == "__main__":
    PLAN.main(__doc__)
