"""Every strategy: what it refuses, with the reason and what would do; its conventions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import toys
from cases import DIT, DIVIDED, JOINT, UNET, WORKLOAD, graph_of
from hypothesis import given, settings
from hypothesis import strategies as st

from paradiff.profiles import Profile
from paradiff.strategies import Facts, Infeasible, SpecError, Workload, facts, parse_spec


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not name=value"),
        ("ulysses", "not name=value"),
        ("ulysses=x", "whole number"),
        ("ulysses=0", "at least 1"),
        ("warp=4", "unknown 'warp'"),
        ("distrifusion=4,patches=2", "unknown 'patches'"),
        ("distrifusion=4,mode=fast", "mode=fast"),
        ("distrifusion=2,pipefusion=2", "both decide"),
        ("cfg=2,cfg=2", "twice"),
        ("rotate=p2p", "unknown 'rotate'"),
        ("serial=4", "serial=4"),
        ("parastep=2,distrifusion=2", "both decide"),
        ("parastep=2,patch=2,pipefusion=2", "both decide"),
        ("batchstep=2,patch=2", "both decide"),
        ("patch=2,cache=2", "unknown 'cache'"),
        ("cache=0", "at least 1"),
        ("offload=gpu", "expected text"),
        ("weights=int4", "weights=int4; expected fp8"),
        ("skip=a", "counts such as"),
        ("patch=\u0663", "whole number"),
        ("pcpp=2,portion=0.0", "portion=0.0"),
        ("pcpp=2,mode=no_sync", "mode=no_sync"),
        ("pcpp=4,portion=1.5", "portion=1.5"),
        ("asyncdiff=2,stride=3", "stride=3"),
    ],
)
def test_malformed_spec_says_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(SpecError, match=says.replace("(", r"\(")):
        parse_spec(text)


@pytest.mark.parametrize(
    ("profile", "spec", "reason", "nearest"),
    [
        (DIT, "ulysses=3", "4 heads", "ulysses=2 or ulysses=4"),
        (DIT, "ring=5", "16 token rows", "ring=4"),
        (UNET, "ulysses=2", "U-Net", "patch=2"),
        (UNET, "pipefusion=2", "U-Net", "distrifusion=2"),
        (UNET, "distrifusion=3", "16 latent rows", "distrifusion=2"),
        (DIT, "cfg=3", "two branches", "cfg=2"),
        (DIT, "pipefusion=5", "4 blocks", "pipefusion=4"),
        (DIT, "pipefusion=2,stages=1:2", "sum to 4", "stages=2:2"),
        (DIT, "pipefusion=2,ulysses=4,stages=balanced,patches=5", "at most 4 patches", "patches=4"),
        (DIT, "pipefusion=2,ring=3", "16 token rows", "ring=2"),
        (DIT, "pipefusion=2,patches=17", "at most 16 patches", "patches=16"),
        (DIT, "pipefusion=2,warmup=0", "at least one", "warmup=1"),
        (DIT, "asyncdiff=5,warmup=1", "between 2 and 4", "asyncdiff=4"),
        (DIT, "asyncdiff=2,warmup=1,cuts=9", "rising block numbers", "cuts=2"),
        (DIT, "parastep=4,warmup=10", "at least one of the 9 steps", "warmup=9"),
        (DIT, "skip=0:3", "nothing to reuse", "cache=2"),
        (DIT, "skip=9", "between 1 and 8", "cache=2"),
        (replace(DIT, skips=((0, 3),)), "cache=2", "skip connections", "serial"),
        (toys.transformer(1), "cache=2", "too few blocks", "serial"),
        (DIT, "streambatch=10", "between 2 and 9", "streambatch=9"),
        (DIT, "batchstep=1", "every step waits", "batchstep=2"),
        (DIT, "parastep=2,ulysses=3", "4 heads", "ulysses=2 or ulysses=4"),
        (DIT, "batchstep=2,cfg=2", "both branches in it", "batchstep=2"),
        (DIT, "asyncdiff=2,ulysses=2,ring=2", "hands on is whole", "asyncdiff=2"),
        (UNET, "pipefusion=5", "U-Net", "distrifusion=4"),
        (UNET, "ulysses=7", "U-Net", "patch=4"),
        (DIT, "distrifusion=2,ulysses=2,exchange=1x2", "one rank's", "distrifusion=2"),
        (DIVIDED, "tensor=3", "4 attention heads .* do not divide by 3", "tensor=2 or tensor=4"),
        (DIVIDED, "tensor=8", "4 attention heads", "tensor=4"),
        (UNET, "tensor=4", "2 groups of a GroupNorm", "tensor=2"),
        (DIT, "tensor=2", "does not say how its weights are divided", "tensor=1"),
        (DIVIDED, "tensor=2,ulysses=4", "2 heads .* on each of 2", "ulysses=2"),
        (DIVIDED, "distrifusion=2,tensor=2", "one rank's", "distrifusion=2"),
        (DIVIDED, "cfg=2,asyncdiff=2,tensor=2", "hands on is whole", "cfg=2,asyncdiff=2"),
    ],
)
def test_infeasible_names_the_reason_and_the_nearest(
    profile: Profile, spec: str, reason: str, nearest: str
) -> None:
    with pytest.raises(Infeasible, match=reason) as caught:
        graph_of(profile, spec)
    assert caught.value.nearest == nearest


def refusal(profile: Profile, spec: str) -> Infeasible | None:
    try:
        graph_of(profile, spec)
    except Infeasible as error:
        return error
    return None


@settings(max_examples=150)
@given(
    profile=st.sampled_from([DIT, JOINT, UNET, DIVIDED]),
    spec=st.one_of(
        st.tuples(
            st.sampled_from(
                ["patch", "distrifusion", "pcpp", "pipefusion", "asyncdiff", "ring", "tensor"]
            ),
            st.integers(2, 19),
        ).map(lambda pair: f"{pair[0]}={pair[1]}"),
        st.tuples(st.integers(1, 9), st.integers(1, 9)).map(
            lambda pair: f"ulysses={pair[0]},ring={pair[1]}"
        ),
        st.tuples(st.integers(2, 4), st.integers(1, 40), st.integers(0, 30)).map(
            lambda each: f"pipefusion={each[0]},patches={each[1]},warmup={each[2]}"
        ),
    ),
)
def test_every_nearest_is_legal(profile: Profile, spec: str) -> None:
    """What is offered instead, alone or in place of the refused keys, is built or refused for more."""
    for _ in range(4):
        refused = refusal(profile, spec)
        if refused is None:
            return
        assert refused.nearest, (spec, str(refused))
        instead = refused.nearest.split(" or ")[0]
        given = dict(part.split("=") for part in spec.split(","))
        offered = dict(part.partition("=")[::2] for part in instead.split(","))
        replaced: set[str] = set()
        if {"ulysses", "ring"} & set(offered):
            replaced = {"ulysses", "ring"}
        if {"serial", "patch", "distrifusion"} & set(offered):
            replaced = set(given)
        merged = {k: v for k, v in given.items() if k not in replaced} | offered
        assert merged != given, spec
        spec = ",".join(f"{k}={v or 1}" for k, v in merged.items())
    raise AssertionError(f"no legal spec after four offers: {spec}")


def test_warm_up_beyond_the_steps_is_all_synchronous() -> None:
    """Three steps with the default warm-up of four: every step is synchronous, as in the reference."""
    short = Workload(16, 4, 1, 3)
    graph = graph_of(UNET, "distrifusion=4", short)
    assert graph.staleness() == 0
    assert facts(parse_spec("distrifusion=4"), short) == Facts(4, 3, True)


def test_facts_know_the_conventions() -> None:
    """w + 1 synchronous steps for DistriFusion and PCPP, w elsewhere (section 0.6); all nine where
    nothing old is read: one patch, or one step left for ParaStep, predicted at the true latent."""

    def of(spec: str) -> tuple[int, int, bool]:
        f = facts(parse_spec(spec), WORKLOAD)
        return f.n_gpus, f.synchronous_steps, f.exact

    assert of("cfg=2,distrifusion=4,warmup=4") == (8, 5, False)
    assert of("distrifusion=4,warmup=8") == (4, 9, True)
    assert of("pipefusion=4,warmup=1") == (4, 1, False)
    assert of("pipefusion=4,patches=1") == (4, 9, True)
    assert of("asyncdiff=3,stride=2,warmup=3") == (4, 3, False)
    assert of("parastep=4,warmup=8") == (4, 9, True)
    assert of("cfg=2,skip=5:4") == (2, 4, False)
    assert of("ulysses=2,cache=3") == (2, 1, False)
    assert of("data=2,cfg=2,ulysses=2") == (8, 9, True)
    assert of("patch=4,mode=naive") == (4, 9, False)
