"""What is printed for other engines, held against their own parsers, classes and documents."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from engines import PACKAGES, WHEELS
from shipped import profile
from typer.testing import CliRunner

from analysis.emit import ENGINES, EngineName, Inexpressible, emit, expressible
from paradiff.cli import plan_app
from paradiff.strategies import Workload, build, parse_spec

AXES = ("cfg", "data", "tensor", "ulysses", "ring", "pipefusion")
DOCUMENTED: dict[str, set[str]] = {
    # xfuser 0.7.0, xfuser/config/args.py: add_runner_args
    "xdit": {
        "--model", "--prompt", "--height", "--width", "--num_frames", "--num_inference_steps",
        "--ulysses_degree", "--ring_degree", "--pipefusion_parallel_degree", "--use_cfg_parallel",
        "--data_parallel_degree",
    },
    # docs.sglang.io/docs/sglang-diffusion: api/cli, parallelism
    "sglang": {
        "--model-path", "--prompt", "--height", "--width", "--num-frames",
        "--num-inference-steps", "--num-gpus", "--ulysses-degree", "--ring-degree", "--tp-size",
        "--cfg-parallel-size",
    },
    # vllm-project/vllm-omni at 0027c20, vllm_omni/entrypoints/cli/serve.py; the tensor one is vLLM's
    "vllm-omni": {
        "--omni", "--ulysses-degree", "--ring-degree", "--cfg-parallel-size",
        "--tensor-parallel-size",
    },
}  # fmt: skip
EXAMPLES = {
    # same file, add_cli_args
    *DOCUMENTED["xdit"], "--num_pipeline_patch", "--warmup_steps", "--attn_layer_num_for_pp",
}  # fmt: skip
FIELDS = {
    # diffusers 0.42.1, models/_modeling_parallel.py
    "ContextParallelConfig": {"ulysses_degree", "ring_degree"},
    "TensorParallelConfig": {"tp_degree"},
    # cache-dit 1.5.3, distributed/config.py
    "ParallelismConfig": {"ulysses_size", "ring_size", "tp_size", "ring_rotate_method"},
}
MODELS = (
    "flux1-dev", "flux1-schnell", "sd3-medium", "sd3.5-large", "pixart-alpha", "hunyuandit",
    "wan2.1-1.3b", "wan2.1-14b", "hunyuanvideo", "cogvideox-2b", "latte", "mochi", "sdxl", "sd15",
)  # fmt: skip


def work(model: str, **changes: Any) -> Workload:
    sizes = {key: profile(model).defaults[key] for key in ("height", "width", "frames", "steps")}
    return Workload(**(sizes | changes))


def written(engine: EngineName, model: str, spec: str, **changes: Any) -> str:
    return emit(engine, parse_spec(spec), profile(model), work(model, **changes))


@cache
def everything(engine: EngineName) -> tuple[tuple[str, str, str], ...]:
    """(model, spec, text) of all that the engine can express on four GPUs."""
    return tuple(
        (model, spec, written(engine, model, spec))
        for model in MODELS
        if ENGINES[engine].support(profile(model))
        for spec in expressible(engine, profile(model), work(model), 4)
    )


def options(text: str) -> dict[str, list[str]]:
    """Options of a command with their values; asserts that nothing else is there."""
    words = shlex.split(re.sub(r"^#.*\n", "", text).replace("\\\n", " "))
    first = next(i for i, word in enumerate(words) if word.startswith("--") and "=" not in word)
    found: dict[str, list[str]] = {}
    for word in words[first:]:
        if word.startswith("--"):
            assert word not in found
            found[word] = []
        else:
            found[list(found)[-1]].append(word)
    return found


def configs(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The configuration objects that a snippet makes, by name, with their literal fields."""
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    named = [(getattr(c.func, "id", getattr(c.func, "attr", "")), c) for c in calls]
    return [
        (name, {str(k.arg): ast.literal_eval(k.value) for k in call.keywords})
        for name, call in named
        if name in FIELDS
    ]


@pytest.mark.parametrize("engine", DOCUMENTED)
def test_options_are_documented_and_degrees_make_the_gpus(engine: EngineName) -> None:
    """Closed form: the degrees of the mesh multiply to the GPUs; a bare --use_cfg_parallel is two."""
    assert len(everything(engine)) > 20
    for model, spec, text in everything(engine):
        found = options(text)
        known = EXAMPLES if "examples/" in text else DOCUMENTED[engine]
        assert set(found) <= known, (model, spec, text)
        gpus = 1
        for option in ENGINES[engine].degrees.values():
            if option in found:
                gpus *= int(found[option][0]) if found[option] else 2
        assert gpus == parse_spec(spec).n_gpus, (model, spec, text)


@pytest.mark.parametrize("engine", ["diffusers", "cache-dit"])
def test_snippets_are_python_and_their_fields_documented(engine: EngineName) -> None:
    assert len(everything(engine)) > 20
    for model, spec, text in everything(engine):
        made = configs(text)
        gpus = parse_spec(spec).n_gpus
        assert len(made) == (gpus > 1), (model, spec)
        for name, fields in made:
            assert set(fields) <= FIELDS[name]
            degrees = [value for value in fields.values() if isinstance(value, int)]
            product = 1
            for degree in degrees:
                product *= degree
            assert product == gpus
        compile(text, "<emitted>", "exec")


def test_words_of_each_engine() -> None:
    """One golden line each: pipefusion with uneven stages for xDiT's script, and a server."""
    line = options(
        written("xdit", "pixart-alpha", "cfg=2,pipefusion=4,patches=8,warmup=2,stages=6:7:8:7")
    )
    assert line["--pipefusion_parallel_degree"] == ["4"]
    assert line["--num_pipeline_patch"] == ["8"]
    assert line["--warmup_steps"] == ["2"]
    assert line["--attn_layer_num_for_pp"] == ["6", "7", "8", "7"]
    assert line["--use_cfg_parallel"] == []
    assert written("xdit", "flux1-dev", "ulysses=4,ring=2").startswith(
        "xdit \\\n  --model FLUX.1-dev"
    )
    served = written("vllm-omni", "wan2.1-14b", "cfg=2,tensor=2", batch=2)
    assert served.splitlines()[0].endswith("batch 2")
    assert served.splitlines()[1] == 'vllm serve "$MODEL" \\'


def test_ranks_are_put_on_the_gpus_of_the_plan() -> None:
    spec, p = parse_spec("ulysses=4"), profile("flux1-dev")
    placed = emit("sglang", spec, p, work("flux1-dev"), (0, 2, 1, 3))
    assert placed.startswith("CUDA_VISIBLE_DEVICES=0,2,1,3 sglang generate")
    assert "CUDA_VISIBLE" not in emit("sglang", spec, p, work("flux1-dev"), (0, 1, 2, 3))


@pytest.mark.parametrize(
    ("engine", "model", "spec", "reason"),
    [
        ("xdit", "sdxl", "pcpp=2,portion=0.3,slice=sender,warmup=2", "xdit has no pcpp=2"),
        ("xdit", "pixart-alpha", "asyncdiff=2,stride=1,warmup=2", "no asyncdiff=2"),
        ("xdit", "flux1-dev", "tensor=4", "no tensor for flux1-dev"),
        ("xdit", "flux1-dev", "pipefusion=3,patches=6,warmup=1", "cannot set patches=6"),
        ("xdit", "flux1-dev", "pipefusion=3,patches=3,warmup=2", "cannot set warmup=2"),
        ("xdit", "pixart-alpha", "pipefusion=4,patches=4,text=per_patch", "no text=per_patch"),
        ("xdit", "pixart-alpha", "ulysses=8,exchange=4x2", "no exchange=4x2"),
        ("xdit", "flux1-dev", "ulysses=8,order=v-first", "no order=v-first"),
        ("xdit", "pixart-alpha", "ulysses=4,weights=fp8", "weights=fp8 is not carried over"),
        ("diffusers", "flux1-dev", "ring=4", "no rotate=p2p"),
        ("diffusers", "flux1-dev", "tensor=2,ulysses=2", "does not combine ulysses and tensor"),
        ("diffusers", "pixart-alpha", "ulysses=2", "it splits nothing"),
        ("sglang", "hunyuanvideo", "ring=2", "it splits ulysses"),
        ("vllm-omni", "flux1-dev", "ulysses=2", "it splits tensor"),
        ("vllm-omni", "pixart-alpha", "cfg=2", "not known of vllm-omni: pixart-alpha"),
        ("cache-dit", "flux1-dev", "serial", "that is --emit diffusers"),
        ("sglang", "flux1-dev", "ulysses=2,offload=text", "offload=text is not carried over"),
    ],
)
def test_what_an_engine_has_not_is_said(
    engine: EngineName, model: str, spec: str, reason: str
) -> None:
    with pytest.raises(Inexpressible, match=re.escape(reason)):
        written(engine, model, spec)


# ---------------------------------------------------------------------------------- engines installed


HYBRIDS: tuple[tuple[EngineName, str, str, dict[str, int]], ...] = (
    ("xdit", "flux1-dev", "ulysses=2,ring=2,pipefusion=2,patches=2,warmup=1", {}),
    ("xdit", "sd3.5-large", "cfg=2,ulysses=2,ring=2", {}),
    ("xdit", "wan2.1-14b", "ulysses=4,ring=2", {"height": 768}),
    ("xdit", "pixart-alpha", "cfg=2,pipefusion=4,patches=8,warmup=2,stages=6:7:8:7", {}),
    ("xdit", "pixart-alpha", "data=2,ulysses=2,pipefusion=2,patches=4,warmup=3", {"batch": 2}),
    ("xdit", "hunyuandit", "cfg=2,ulysses=2,pipefusion=2,patches=2,warmup=1", {}),
    ("sglang", "flux1-dev", "tensor=2,ulysses=2,ring=2", {"height": 768, "steps": 7}),
    ("sglang", "wan2.1-14b", "cfg=2,ulysses=2,ring=2", {"height": 768}),
    ("sglang", "hunyuanvideo", "ulysses=8", {"height": 768, "frames": 125}),
    ("vllm-omni", "wan2.1-14b", "cfg=2,tensor=2,ulysses=2,ring=2", {"height": 768}),
    ("vllm-omni", "sd3-medium", "cfg=2,tensor=4", {}),
    ("cache-dit", "flux1-dev", "tensor=2,ulysses=2,ring=2", {}),
    ("cache-dit", "hunyuanvideo", "ulysses=2,ring=4,rotate=allgather", {"height": 768}),
)
"""On up to 16 GPUs, for the parsers beside all on four; changes of the workload."""


def read_by(engine: EngineName, lines: Sequence[object]) -> list[dict[str, Any]]:
    """What the engine's own parser reads, ``{"read": ...}`` or ``{"refused": why}`` a line."""
    if not (WHEELS / PACKAGES[engine]).is_dir():
        pytest.skip(f"{PACKAGES[engine]} is not in {WHEELS}: make engines")
    answer = subprocess.run(
        [sys.executable, "tests/engines.py", engine],
        input=json.dumps(lines), capture_output=True, text=True, check=False, timeout=300,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr[-2000:]
    return list(json.loads(answer.stdout))


def line(engine: EngineName, text: str) -> object:
    """Words of a command; of a snippet for cache-dit, the fields that it gives."""
    if engine == "cache-dit":
        ((_, fields),) = configs(text)
        return fields
    return shlex.split(re.sub(r"^#.*\n", "", text).replace("\\\n", " "))


def planned(model: str, text: str, **changes: int) -> dict[str, Any]:
    """What a parser should read of a plan."""
    spec, w = parse_spec(text), work(model, **changes)
    known: dict[str, Any] = {"height": w.height, "width": w.width, "steps": w.steps}
    known |= {"gpus": spec.n_gpus, "prompts": spec.degree("data") * w.batch, "omni": True}
    if w.frames > 1:
        known["frames"] = w.frames
    if model == "hunyuanvideo":
        known["whole_frames"] = w.frames
    if spec.degree("ring") > 1:
        known["rotate"] = spec.options.get("rotate", "p2p")
    if spec.name == "pipefusion":
        known |= {key: int(spec.options[key]) for key in ("patches", "warmup")}
        if ":" in spec.options.get("stages", ""):
            known["stages"] = [int(n) for n in spec.options["stages"].split(":")]
    degrees = {axis: spec.degree(axis) for axis in AXES}
    return known | {axis: degree for axis, degree in degrees.items() if degree > 1}


@pytest.mark.parametrize("engine", PACKAGES)
def test_an_engine_reads_the_plan_that_was_made(engine: EngineName) -> None:
    """Every line through the engine's own parser and its own checks of degrees: GPUs, the degree of each
    axis and of no other, sizes, steps, PipeFusion's parameters are those of the plan."""
    cases = [(*case, {}) for case in everything(engine)]
    for _, model, spec, changes in (each for each in HYBRIDS if each[0] == engine):
        build(parse_spec(spec), profile(model), work(model, **changes))  # a plan that there is
        cases.append((model, spec, written(engine, model, spec, **changes), changes))
    answers = read_by(engine, [line(engine, text) for _, _, text, _ in cases])
    for (model, spec, text, changes), answer in zip(cases, answers, strict=True):
        assert "read" in answer, (text, answer)
        read, expected = answer["read"], planned(model, spec, **changes)
        assert {key: read[key] for key in read if key in expected} == {
            key: expected[key] for key in expected if key in read or key in AXES
        }, (model, spec, text)
        assert not {key for key in read if key in AXES} - set(expected), (model, spec, text)


XDIT = ["xdit", "--model", "FLUX.1-dev", "--prompt", "a"]
SCRIPT = ["torchrun", "--nproc_per_node=4", "example.py", "--model", "m", "--prompt", "a"]
GENERATE = ["sglang", "generate", "--model-path", "m", "--prompt", "a", "--num-gpus", "8"]
SERVE = ["vllm", "serve", "m", "--omni"]


REFUSED: dict[str, list[tuple[object, str]]] = {
    "xdit": [
        ([*XDIT, "--warmup_steps", "2"], "unrecognized arguments: --warmup_steps"),
        ([*XDIT, "--num_pipeline_patch", "4"], "unrecognized arguments"),
        ([*SCRIPT, "--ulysses_degree", "2"], "parallel_world_size 2 must be equal"),
        ([*SCRIPT, "--pipefusion_parallel_degree", "4", "--attn_layer_num_for_pp", "9", "9"],
         "attn_layer_num_for_pp must have the same"),
        ([*SCRIPT, "--patch_degree", "4"], "unrecognized arguments: --patch_degree"),
    ],
    "sglang": [
        ([*GENERATE, "--ulysses-degree", "3"], "must equal ring_degree * ulysses_degree"),
        ([*GENERATE, "--cfg-parallel-size", "3"], "must be divisible"),
        ([*GENERATE, "--pipefusion-degree", "8"], "unrecognized arguments"),
    ],
    "vllm-omni": [
        ([*SERVE, "--num-inference-steps", "28"], "unrecognized arguments"),
        ([*SERVE, "--ulysses-degree", "two"], "invalid int value"),
    ],
    "cache-dit": [
        ({}, "No parallelism is enabled"),
        ({"ulysses_degree": 2}, "unexpected keyword argument"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("engine", PACKAGES)
def test_an_engine_refuses_other_lines(engine: EngineName) -> None:
    """What is not written for an engine, because its parser has no such thing, or degrees that do not
    make the GPUs: so the reading above can fail."""
    answers = read_by(engine, [words for words, _ in REFUSED[engine]])
    for (words, why), answer in zip(REFUSED[engine], answers, strict=True):
        assert why in answer.get("refused", ""), (words, answer)


def test_the_scripts_of_xdit_are_in_its_wheel() -> None:
    if not (WHEELS / "xfuser").is_dir():
        pytest.skip(f"xfuser is not in {WHEELS}: make engines")
    scripts = [s.run for s in ENGINES["xdit"].models.values() if s.run.endswith(".py")]
    assert len(scripts) > 3
    assert all((WHEELS / script).is_file() for script in scripts)


def test_sglang_would_make_a_longer_clip() -> None:
    """HunyuanVideo's 129 frames are 33 latent ones, of which sglang makes 36 on four ranks: 141."""
    with pytest.raises(Inexpressible, match="between latent frames: 33 over 4 ranks"):
        written("sglang", "hunyuanvideo", "ulysses=4", height=704)
    words = line("sglang", written("sglang", "hunyuanvideo", "ulysses=4", height=704, frames=125))
    assert isinstance(words, list)
    words[words.index("125")] = "129"
    (answer,) = read_by("sglang", [words])
    assert answer["read"]["whole_frames"] == 141


@pytest.mark.torch
def test_torchrun_starts_a_process_for_each_gpu() -> None:
    """The scripts and the snippets, by torchrun's own parser."""
    run = pytest.importorskip("torch.distributed.run")
    for engine in ("xdit", "diffusers", "cache-dit"):
        for model, spec, text in everything(engine):
            if "torchrun" in text:
                words = shlex.split(text.removeprefix("# ").replace("\\\n", " ").split("\n")[0])
                parsed = run.get_args_parser().parse_args(words[1:])
                assert int(parsed.nproc_per_node) == parse_spec(spec).n_gpus, (model, spec)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("FLUX.1-dev", "flux"),
        ("SD3.5", "stable_diffusion"),
        ("HunyuanVideo", "hunyuan"),
        ("Wan2.1-T2V", "wan"),
    ],
)
def test_xdit_declares_what_its_models_split(name: str, file: str) -> None:
    """ModelCapabilities of the class that is registered under the printed name."""
    (support,) = [s for s in ENGINES["xdit"].models.values() if s.run == name]
    package = WHEELS / "xfuser"
    if not package.is_dir():
        pytest.skip(f"xfuser is not in {WHEELS}: make engines")
    models = package / "model_executor" / "models" / "runner_models"
    tree = ast.parse((models / f"{file}.py").read_text())
    (model,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any(isinstance(d, ast.Call) and d.args[0].value == name for d in node.decorator_list)  # type: ignore[attr-defined]
    ]
    declared = [
        {str(k.arg) for k in call.keywords if getattr(k.value, "value", None) is True}
        for call in ast.walk(model)
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "ModelCapabilities"
    ][-1]
    for axis, option in ENGINES["xdit"].degrees.items():
        if axis != "data":
            assert (axis in support.axes) == (option.removeprefix("--") in declared), axis


@pytest.mark.torch
def test_diffusers_makes_the_configurations_and_has_the_plans() -> None:
    """Every configuration can be made; a class is said to split just what its plans allow."""
    diffusers = pytest.importorskip("diffusers")
    for _, _, text in everything("diffusers"):
        for name, fields in configs(text):
            getattr(diffusers, name)(**fields)
    for name, support in ENGINES["diffusers"].models.items():
        model = getattr(diffusers, name)
        assert ("ulysses" in support.axes) == (getattr(model, "_cp_plan", None) is not None), name
        assert ("tensor" in support.axes) == (getattr(model, "_tp_plan", None) is not None), name


# -------------------------------------------------------------------------------------- command line


def run(*arguments: str) -> Any:
    return CliRunner().invoke(plan_app, ["--topology", "pcie8", "--steps", "6", *arguments])


def test_the_recommended_plan_is_emitted() -> None:
    asked = ["--model", "flux1-dev", "--strategy", "ulysses=2", "--emit", "xdit"]
    done = run(*asked)
    assert done.exit_code == 0, done.stderr
    line = written("xdit", "flux1-dev", "ulysses=2", steps=6)
    assert done.stdout.endswith(f"\nFor xdit:\n\n{line}\n")
    assert json.loads(run(*asked, "--format", "json").stdout)["emit"] == line
    assert "emit" not in json.loads(run(*asked[:4], "--format", "json").stdout)


def test_what_cannot_be_emitted_names_the_best_that_can() -> None:
    """Of diffusers' words for flux1-dev the one named ranks first when all of them are planned."""
    done = run("--model", "flux1-dev", "--strategy", "tensor=2,ulysses=2", "--emit", "diffusers")
    assert done.exit_code == 3
    assert "diffusers does not combine ulysses and tensor" in done.stderr
    named = re.search(r"nearest: --strategy (\S+)$", done.stderr.strip())
    assert named is not None
    specs = expressible("diffusers", profile("flux1-dev"), work("flux1-dev", steps=6), 8)
    all_of_them = [part for spec in specs for part in ("--strategy", spec)]
    ranked = run("--model", "flux1-dev", *all_of_them, "--format", "json")
    assert json.loads(ranked.stdout)["recommended"] == named[1]
    asked = run("--model", "flux1-dev", "--strategy", named[1], "--emit", "diffusers")
    assert asked.exit_code == 0, asked.stderr


def test_machines_are_not_mixed_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.emit.expressible", lambda *_: iter(()))
    arguments = ["--topology", "pcie8x2", "--model", "flux1-dev", "--steps", "6"]
    arguments += ["--strategy", "ulysses=2,ring=8", "--emit", "xdit"]
    done = CliRunner().invoke(plan_app, arguments)
    assert done.exit_code == 3
    assert "spans machines" in done.stderr
