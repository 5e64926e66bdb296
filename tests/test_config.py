# ruff: noqa: E501 - one case per line reads as a table
"""Reading files: whatever is in them, a model or one ConfigError that says where."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paradiff.config import (
    MAX_FILE_BYTES,
    ConfigError,
    Strict,
    apply_overrides,
    available,
    find,
    load_yaml,
    problem,
    read_document,
)
from paradiff.units import BytesPerSecond


class Wire(Strict):
    bandwidth: BytesPerSecond
    lanes: int = 16


class Box(Strict):
    name: str
    shared: bool = False
    wires: tuple[Wire, ...] = ()


GOOD = "name: a\nwires:\n  - {bandwidth: 1 GB/s}\n  - bandwidth: 2 GB/s\n    lanes: 8\n"


def write(path: Path, content: str | bytes) -> Path:
    file = path / "box.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def complaint(path: Path, content: str | bytes, *overrides: str) -> str:
    """The message for a file called box.yaml, without its directory."""
    with pytest.raises(ConfigError) as error:
        load_yaml(write(path, content), Box, overrides)
    return str(error.value).replace(f"{path}{os.sep}", "")


def test_a_good_file(tmp_path: Path) -> None:
    box = load_yaml(write(tmp_path, GOOD), Box)
    assert box.wires == (Wire(bandwidth="1 GB/s"), Wire(bandwidth="2 GB/s", lanes=8))  # type: ignore[arg-type]
    assert box.wires[1].bandwidth == 2e9


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (GOOD.replace("lanes", "lane"), "box.yaml:5:5: wires.1.lane: unknown key (lane), allowed: lanes, bandwidth"),
        (GOOD.replace("  - bandwidth", "  - bandwith"), "box.yaml:4:5: wires.1.bandwith: unknown key"),
        ("shared: true\n", "box.yaml:1:1: key missing (name)"),
        (GOOD.replace("2 GB/s", "2"), "box.yaml:4:16: wires.1.bandwidth: bandwidth has no unit (2), allowed: B/s"),
        (GOOD.replace("8", "eight"), "box.yaml:5:12: wires.1.lanes: not allowed ('eight'), allowed: a whole number"),
        (GOOD + "shared: maybe\n", "box.yaml:6:9: shared: not allowed ('maybe'), allowed: true or false"),
        ("name: 5\n", "box.yaml:1:7: name: not allowed (5), allowed: text"),
        ("name: a\nwires: 3\n", "box.yaml:2:8: wires: not allowed (3), allowed: a list"),
        ("name: a\nwires: [3]\n", "box.yaml:2:9: wires.0: "),
        (GOOD + "name: b\n", "box.yaml:6:1: duplicate key (name)"),
        ("name: [a\n", "box.yaml:2:1: not valid YAML"),
        ("name: a\n\tx: b\n", "box.yaml:2:1: not valid YAML"),
        ("name: *a\n", "box.yaml:1:7: not valid YAML (found undefined alias"),
        ("name: a\n---\nname: b\n", "box.yaml:2:1: not valid YAML"),
        ("", "box.yaml:1:1: not a mapping (None)"),
        ("- a\n", "box.yaml:1:1: not a mapping (['a'])"),
        ("1: a\n", "box.yaml:1:1: key is not a word"),
        ("name: !!python/object/apply:os.system [id]\n", "box.yaml:1:7: tag ("),
        ("name: !secret x\n", "box.yaml:1:7: tag or merge key (!secret)"),
        ("x: &a {y: 1}\nz: {<<: *a}\n", "box.yaml:2:5: tag or merge key"),
        ("%YAML 3.0\n---\nname: a\n", "box.yaml:1:1: not valid YAML"),
        (b"name: a\n\x00\x01", "box.yaml:2:1: binary file ('\\x00'), allowed: UTF-8 text"),
        (b"name: a\nx\xff\xfe", "box.yaml:2:2: not text (byte 0xff), allowed: UTF-8"),
        (b"\x1f\x8b\x08\x00gz", "box.yaml:1:2: not text (byte 0x8b), allowed: UTF-8"),
        (b"a: " + b"x" * MAX_FILE_BYTES, f"box.yaml: too large, allowed: {MAX_FILE_BYTES} bytes at most"),
        ("a: " + "[" * 200_000, "box.yaml:1:1: nested too deep, allowed: 32 levels"),
        ("a: " + "[" * 50 + "]" * 50, "box.yaml:1:36: nested too deep, allowed: 32 levels"),
        ("a: &a [*a]\n", "box.yaml:1:4: nested too deep, allowed: 32 levels"),
    ],
)  # fmt: skip
def test_position_and_sentence(tmp_path: Path, content: str | bytes, says: str) -> None:
    assert complaint(tmp_path, content).startswith(says)


def test_alias_bomb(tmp_path: Path) -> None:
    # Ten aliases per level, nine levels: 10^9 values from 300 bytes.
    lines = ["a: &a [x,x,x,x,x,x,x,x,x,x]"]
    for child, name in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{name}: &{name} [{','.join(['*' + child] * 10)}]")
    assert "too many values, allowed: 50000 with" in complaint(tmp_path, "\n".join(lines))


def test_a_typo_is_told_before_the_key_it_leaves_missing(tmp_path: Path) -> None:
    assert complaint(tmp_path, "nmae: a\n") == (
        "box.yaml:1:1: nmae: unknown key (nmae), allowed: name, shared, wires (and 1 more)"
    )


def test_a_model_may_point_below_itself(tmp_path: Path) -> None:
    from pydantic import model_validator

    class Even(Box):
        @model_validator(mode="after")
        def _even(self) -> "Even":
            for i, wire in enumerate(self.wires):
                if wire.lanes % 2:
                    raise problem("odd {lanes}", wire.lanes, "even", ("wires", i, "lanes"))
            return self

    file = write(tmp_path, GOOD.replace("8", "7"))
    with pytest.raises(
        ConfigError, match=r":5:12: wires.1.lanes: odd {lanes} \(7\), allowed: even"
    ):
        load_yaml(file, Even)


@pytest.mark.parametrize("name", ["missing.yaml", "", "."])
def test_files_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read|is a directory"):
        load_yaml(tmp_path / name, Box)


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "replace")))
def test_any_bytes_give_a_document_or_a_config_error(tmp_path_factory: Any, raw: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(raw)
    try:
        outcome: Any = read_document(file).data
    except ConfigError as error:
        outcome = str(error)
    assert isinstance(outcome, dict) or re.match(r".*any\.yaml:\d+:\d+: ", outcome)


class TestOverrides:
    def test_a_value_is_replaced_and_the_original_kept(self) -> None:
        data = {"name": "a", "wires": [{"bandwidth": "1 GB/s"}]}
        changed = apply_overrides(data, ["wires.0.bandwidth=52 GB/s", "name=b"])
        assert changed == {"name": "b", "wires": [{"bandwidth": "52 GB/s"}]}
        assert data == {"name": "a", "wires": [{"bandwidth": "1 GB/s"}]}

    def test_in_a_file(self, tmp_path: Path) -> None:
        file = write(tmp_path, GOOD)
        box = load_yaml(file, Box, ["wires.0.bandwidth=5 GB/s", "shared=true", "wires.0.lanes=4"])
        assert box.shared is True
        assert box.wires[0] == Wire(bandwidth="5 GB/s", lanes=4)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("override", "says"),
        [
            ("wire.0.bandwidth=1 GB/s", "unknown path (wire), allowed: wires, name"),
            ("wires.2.bandwidth=1 GB/s", "unknown path (wires.2), allowed: 0, 1"),
            ("wires.-1.lanes=1", "unknown path (wires.-1), allowed: 0, 1"),
            ("wires.0.lane=1", "unknown path (wires.0.lane), allowed: lanes, bandwidth"),
            ("name.x=1", "unknown path (name.x), allowed: nothing"),
            ("name", "not an override, allowed: PATH=VALUE"),
            ("=3", "not an override, allowed: PATH=VALUE"),
            ("name=", "no value, allowed: PATH=VALUE"),
            ("wires.0.bandwidth=3", "wires.0.bandwidth: bandwidth has no unit (3), allowed: B/s"),
            ("shared=[", "value:1:2: not valid YAML"),
            ("shared=null", "shared: not allowed (None), allowed: true or false"),
        ],
    )
    def test_errors_name_the_override(self, tmp_path: Path, override: str, says: str) -> None:
        assert complaint(tmp_path, GOOD, override).startswith(f"--set {override}: {says}")


class TestNames:
    def test_shipped_names_work_from_any_directory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert find("topologies", "pcie8") == find("topologies", "pcie8.yaml")
        assert find("topologies", "pcie8").is_file()

    def test_a_file_in_the_current_directory_wins(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "pcie8.yaml").touch()
        assert find("topologies", "pcie8").resolve() == tmp_path / "pcie8.yaml"
        assert find("topologies", str(tmp_path / "pcie8")) == tmp_path / "pcie8.yaml"

    def test_an_unknown_name_lists_the_names_nearest_first(self) -> None:
        with pytest.raises(ConfigError) as error:
            find("topologies", "pcie9")
        listed = str(error.value).split("one of ")[1].split(", ")
        assert listed[0] == "pcie8"
        assert sorted(listed) == list(available("topologies"))

    @pytest.mark.parametrize(
        "name", ["", ".", "..", "/", "../gpus/l40", "a\0b", "topologies/pcie8"]
    )
    def test_names_that_are_no_names(self, name: str) -> None:
        with pytest.raises(ConfigError, match="no such file in topologies"):
            find("topologies", name)
