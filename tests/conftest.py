"""Shared test set-up: GPU tests are skipped with a reason where there is no GPU; every test starts with a clean Dynamo."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from tests import repeats

worker = os.environ.get("PYTEST_XDIST_WORKER")
if worker:
    torch.set_num_threads(1)  # the workers share the cores; more threads than cores wait for one another
    gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    gpus = gpus or [str(i) for i in range(torch.cuda.device_count())]
    if len(gpus) > 1:  # each worker keeps to one GPU
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[int(worker.removeprefix("gw")) % len(gpus)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--families", action="store_true", help="test every model family of transformers (an hour)")
    parser.addoption(
        "--check-repeats", action="store_true", help="every name in tests/repeats.py must be of a collected test"
    )


def pytest_pycollect_makemodule() -> None:
    """What tests compare with is rounded to nearest; those of other roundings name them in their policies.

    Here, since a process that only hands tests to others need not import the package.
    """
    from quant_compile.lowering.rounding import recipe

    recipe.DEFAULT = recipe.NEAREST


@pytest.hookimpl(tryfirst=True)  # before -m reads the markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    repeats.mark(items, whole=config.getoption("--check-repeats"))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, and this machine has none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    """After a fault of a kernel a process can use its GPU no more: a worker ends, and another one goes on with the other tests."""
    if worker is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"{worker}: the GPU is lost to this process after {nodeid}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    """Compiled code of one test must not serve another."""
    torch._dynamo.reset()
    torch.manual_seed(0)
