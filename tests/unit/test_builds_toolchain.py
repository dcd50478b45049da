"""What this machine could compile, from facts given as data."""

import shutil
import sys
from pathlib import Path

import pytest

from loadmaster.engine import toolchain
from loadmaster.engine.toolchain import Target, choose_target, mend_command, parse_vulkan_header
from loadmaster.errors import EngineMissingError


@pytest.mark.parametrize(
    ("gpus", "tools", "expected"),
    [
        (set(), set(), "cpu"),
        (set(), {"cuda"}, "cpu"),
        ({"cuda"}, {"cuda"}, "cuda"),
        ({"cuda", "vulkan"}, {"vulkan"}, "vulkan"),
        ({"rocm", "vulkan"}, {"rocm", "vulkan", "cuda"}, "rocm"),
        ({"metal"}, {"metal"}, "metal"),
    ],
)
def test_choose_target(gpus: set[Target], tools: set[Target], expected: Target) -> None:
    choice = choose_target(gpus, tools)
    assert choice.target == expected
    assert choice.mend is None


def test_a_gpu_without_tooling_gets_the_cpu_and_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(toolchain, "find_tool", lambda target: None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    choice = choose_target({"cuda"}, set())
    assert choice.target == "cpu"
    assert choice.mend == ("apt-get install nvidia-cuda-toolkit && loadmaster engine build --cuda")
    assert "nvcc" in choice.why


def test_mend_without_apt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "find_tool", lambda target: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert mend_command("rocm").startswith("loadmaster engine build --rocm   # after installing")
    assert mend_command("metal") == "xcode-select --install && loadmaster engine build --metal"


def test_vulkan_header_version() -> None:
    text = """
// Version of this file
#define VK_HEADER_VERSION 239

// Complete version of this file
#define VK_HEADER_VERSION_COMPLETE VK_MAKE_API_VERSION(0, 1, 3, VK_HEADER_VERSION)
"""
    assert parse_vulkan_header(text) == (1, 3, 239)
    assert parse_vulkan_header("") == ()


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(
        shutil, "which", lambda name: "/usr/bin/apt-get" if name == "apt-get" else None
    )
    with pytest.raises(EngineMissingError, match=r"no C\+\+ compiler") as refused:
        toolchain.require("cpu")
    assert refused.value.hint == "`apt-get install g++`"


def test_missing_gpu_tooling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "find_compiler", lambda: Path("/usr/bin/c++"))
    monkeypatch.setattr(toolchain, "find_tool", lambda target: None)
    with pytest.raises(EngineMissingError, match="CUDA toolkit") as refused:
        toolchain.require("cuda")
    assert "loadmaster engine build --cuda" in str(refused.value.hint)
