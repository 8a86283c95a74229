import gc
import os
from pathlib import Path

if not Path("/dev/nvidia0").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which torch does, too

import pytest
import torch

gc.set_threshold(100_000, 50, 100)  # to look for cycles among a million objects took a tenth of the time


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the long sweeps too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="long; run with --slow"))
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)  # the tensors are small, and threads that wait for each other only slow a busy machine
    torch.manual_seed(0)
