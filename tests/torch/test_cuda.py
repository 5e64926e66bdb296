"""What a GPU alone can show: its streams, its fused attention, its library of transfers.

``pytest -m gpu`` runs these and all tests that use ``device``: whole runs, faults, decoding.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from threading import Thread

import pytest
import torch
from test_faults import spoilt_rank
from typer.testing import CliRunner

from paradiff.cli import app
from paradiff.executor.sequence import attend
from paradiff.executor.streams import Step, on_cuda
from paradiff.graph import Instance, Op
from paradiff.trace import Span, read_chrome_trace

pytestmark = [
    pytest.mark.torch,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_of_a_block_is_that_of_the_cpu(dtype: torch.dtype) -> None:
    """Fused where there is no mask; 70 queries are no multiple of what its sums are padded to."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 64, generator=generator) for n in (70, 90, 90))
    mask = torch.rand(2, 1, 1, 90, generator=generator) > 0.4
    for seen in (None, mask):
        there = None if seen is None else seen.cuda()
        ours = attend(*(x.cuda().to(dtype) for x in (query, key, value)), there)
        for got, expected in zip(ours, attend(query, key, value, seen), strict=True):
            torch.testing.assert_close(got.float().cpu(), expected, rtol=2e-2, atol=2e-2)


def test_a_long_kernel_holds_up_what_waits_for_it_alone() -> None:
    """Of some 2e9 cycles, a second or more: until it ends the rank says that it is there."""
    names = [("long", "compute"), ("beside", "copies"), ("after", "compute")]
    ops = [Op(name, "compute", "guidance", (0,), stream) for name, stream in names]
    before = [(), (), (0,)]
    steps = [Step(n, Instance(op, 0), before[n]) for n, op in enumerate(ops)]
    doing: dict[str, str] = {}
    spans: list[Span] = []

    def perform(number: int, _: Instance) -> None:
        torch.cuda._sleep(10_000 if number else 2_000_000_000)

    def issue() -> None:
        where = torch.device("cuda")
        spans.extend(on_cuda(steps, perform, where, 0, lambda _: iter(()), doing=doing))

    issuer = Thread(target=issue)
    issuer.start()
    time.sleep(0.5)  # all three have been issued
    assert doing["compute"] == "long"
    issuer.join()
    long, beside, after = spans
    assert beside.end_s < long.end_s <= after.start_s
    assert long.end_s - long.start_s > 0.5


def test_the_command_runs_there(tmp_path: Path) -> None:
    arguments = ["run", "--model", "sd21", "--strategy", "distrifusion=2,warmup=1", "--steps", "4",
                 "--device", "cuda", "--output-dir", str(tmp_path / "out")]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    trace = read_chrome_trace(tmp_path / "out" / "trace.json.gz")
    assert {span.stream for span in trace.spans} > {"compute"}
    made = dict(trace.meta)
    assert (made["kernels"], made["device"]) == ("real", torch.cuda.get_device_name())


def test_one_rank_over_nccl(tmp_path: Path) -> None:
    """The threads, groups and clocks of a launch, with a GPU in place of the CPU."""
    arguments = ["run", "--model", "sd21", "--steps", "2", "--device", "cuda", "--launch", "1",
                 "--timeout", "200", "--output-dir", str(tmp_path / "out")]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "image-0.png").is_file()


def test_a_plan_runs_on_the_gpu_that_it_names(tmp_path: Path) -> None:
    plan = ["plan", "--topology", "pcie8", "--model", "sd21", "--strategy", "serial", "--steps", "2",
            "--output-dir", str(tmp_path / "plan")]  # fmt: skip
    assert CliRunner().invoke(app, plan).exit_code == 0
    (file,) = (tmp_path / "plan").glob("*.plan.yaml")
    arguments = ["run", str(file), "--device", "cuda", "--launch", "1", "--timeout", "200"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    absent = torch.cuda.device_count()
    file.write_text(re.sub(r"placement: .*", f"placement: [{absent}]", file.read_text()))
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2, done.output
    assert len(done.stderr.splitlines()) == 1


def test_memory_of_the_device_that_ends_is_named(tmp_path: Path) -> None:
    with spoilt_rank(tmp_path, "cuda", "x.new_empty(1 << 50)") as (_, end):
        message = end()
    assert re.search(r"step \d+, op t\d+/\S+@r0, rank 0: out of memory", message), message
