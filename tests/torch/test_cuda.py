"""On a GPU: all virtual ranks on one device, a CUDA stream for each stream of each rank.

``pytest -m gpu``. Without a CUDA device these tests skip, and nothing else depends on them.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import plain_loops as plain
import pytest
import torch
from test_executor_strips import execute, graph_of, request_of
from torch.utils._pytree import tree_map
from typer.testing import CliRunner

from paradiff.cli import app
from paradiff.executor.interpreter import Result, run_graph
from paradiff.executor.job import Job, prepare
from paradiff.executor.network import Network
from paradiff.executor.sequence import attend
from paradiff.trace import check_trace, read_chrome_trace

pytestmark = [
    pytest.mark.torch,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]

CASES = [
    ("sd21", "serial"),
    ("sd21", "cfg=2"),
    ("sd21", "patch=4"),
    ("sd21", "patch=2,mode=naive"),
    ("sd21", "distrifusion=4,warmup=1"),
    ("sd21", "pcpp=4,warmup=1"),
    ("sd21", "asyncdiff=3,warmup=1,stride=2"),
    ("sd21", "parastep=4,warmup=1"),
    ("sd21", "batchstep=2,warmup=1"),
    ("sd21", "cfg=2,streambatch=2"),
    ("svd", "distrifusion=2,warmup=1"),
    ("pixart-alpha", "pipefusion=4,patches=4"),
    ("pixart-alpha", "cfg=2,pipefusion=2,patches=4,ulysses=2"),
    ("sd3-medium", "ulysses=2,ring=2"),
    ("sd3-medium", "tensor=2"),
    ("sd3-medium", "cfg=2,cache=2"),
    ("flux1-dev", "pipefusion=2,patches=4,text=per_patch"),
    ("cogvideox-2b", "cfg=2,ulysses=2"),
    ("hunyuandit", "pipefusion=2,patches=2"),
    ("wan2.1-1.3b", "ring=2"),
    ("wan2.1-1.3b", "tensor=2"),
]


def on_gpu(value: Any) -> Any:
    return tree_map(lambda t: t.cuda() if isinstance(t, torch.Tensor) else t, value)


@cache
def model_on_gpu(name: str) -> torch.nn.Module:
    return deepcopy(plain.twin(name)[1]).cuda()


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_streams_compute_what_the_cpu_computes(name: str, spec: str) -> None:
    graph = graph_of(name, spec)
    request = request_of(name)
    request = replace(request, conditioning=[on_gpu(dict(c)) for c in request.conditioning])
    result = run_graph(graph, Network(model_on_gpu(name), plain.twin(name)[0]), request)
    check_trace(graph, result.trace)
    expected = execute(name, graph).latents[0]
    assert plain.relative(result.latents[0].cpu(), expected) < 1e-10


def test_strips_of_a_picture_are_those_of_the_cpu() -> None:
    def ran(device: str) -> Result:
        job = Job("tiny-sd21", "patch=2,vae=split", steps=2, dtype="fp64", device=device)
        return prepare(job).in_process()

    ours, expected = ran("cuda"), ran("cpu")
    assert plain.relative(ours.latents[0].cpu(), expected.latents[0]) < 1e-10
    assert plain.relative(ours.decoded[0].cpu(), expected.decoded[0]) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_of_a_block_is_that_of_the_cpu(dtype: torch.dtype) -> None:
    """Fused where there is no mask; 70 queries are no multiple of what its sums are padded to."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 64, generator=generator) for n in (70, 90, 90))
    mask = torch.rand(2, 1, 1, 90, generator=generator) > 0.4
    for seen in (None, mask):
        ours = attend(*(x.cuda().to(dtype) for x in (query, key, value)), on_gpu(seen))
        for got, expected in zip(ours, attend(query, key, value, seen), strict=True):
            torch.testing.assert_close(got.float().cpu(), expected, rtol=2e-2, atol=2e-2)


def test_the_command_runs_there(tmp_path: Path) -> None:
    arguments = ["run", "--model", "sd21", "--strategy", "distrifusion=2,warmup=1", "--steps", "4",
                 "--device", "cuda", "--output-dir", str(tmp_path / "out")]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    trace = read_chrome_trace(tmp_path / "out" / "trace.json.gz")
    assert {span.stream for span in trace.spans} > {"compute"}


def test_one_rank_over_nccl(tmp_path: Path) -> None:
    """The threads, groups and clocks of a launch, with a GPU in place of the CPU."""
    arguments = ["run", "--model", "sd21", "--steps", "2", "--device", "cuda", "--launch", "1",
                 "--output-dir", str(tmp_path / "out")]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "image-0.png").is_file()
