"""Which engine this machine can compile: compilers, GPU tooling, and the GPUs themselves.

A GPU is looked for by its device files alone: asking a driver would need the libraries that may
be missing.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from loadmaster.errors import EngineMissingError

Target = Literal["cuda", "rocm", "vulkan", "metal", "cpu"]
TARGETS: tuple[Target, ...] = get_args(Target)  # the first that this machine can use is taken

_GPU_VENDORS = {"0x10de", "0x1002", "0x8086"}  # NVIDIA, AMD, Intel; not the cards of emulators
# vk::LayerSettingEXT, which ggml-vulkan uses; Debian 12 has 1.3.239.
_OLDEST_VULKAN_HEADER = (1, 3, 272)

_TOOLING = {
    "cuda": "the CUDA toolkit (nvcc)",
    "rocm": "ROCm (hipcc)",
    "vulkan": "the Vulkan SDK (glslc and headers 1.3.272 or newer)",
    "metal": "the Xcode command line tools",
}
_APT = {
    "cuda": "nvidia-cuda-toolkit",
    "rocm": "hipcc libhipblas-dev librocblas-dev",
    "vulkan": "glslc libvulkan-dev spirv-headers",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The target that fits this machine; `mend` is typed to get a build for its GPU instead."""

    target: Target
    why: str
    mend: str | None = None


def choose_target(gpus: Collection[Target], tools: Collection[Target]) -> Choice:
    """The first target whose GPU and tooling are both here; the CPU when there is none."""
    for target in TARGETS:
        if target in gpus and target in tools:
            return Choice(target=target, why=f"a GPU for {target} and {_TOOLING[target]} are here")
    for target in TARGETS:
        if target in gpus:
            why = f"a GPU is here, but {_TOOLING[target]} is missing"
            return Choice(target="cpu", why=why, mend=mend_command(target))
    return Choice(target="cpu", why="no GPU was found")


def mend_command(target: Target) -> str:
    """What to type on this machine to get a build for `target`, tooling included."""
    build = f"loadmaster engine build --{target}"
    if target == "cpu" or find_tool(target) is not None:
        return build
    if target == "metal":
        return f"xcode-select --install && {build}"
    # A distribution with old Vulkan headers has no newer ones to install.
    if shutil.which("apt-get") and not (target == "vulkan" and _vulkan_header()):
        return f"apt-get install {_APT[target]} && {build}"
    return f"{build}   # after installing {_TOOLING[target]}"


def present_gpus() -> set[Target]:
    """Targets that could drive a GPU of this machine."""
    found: set[Target] = set()
    if Path("/dev/nvidiactl").exists() or Path("/usr/lib/wsl/lib/libnvidia-ml.so.1").exists():
        found.add("cuda")
    if Path("/dev/kfd").exists():
        found.add("rocm")
    if any(_vendor(node) in _GPU_VENDORS for node in Path("/sys/class/drm").glob("renderD*")):
        found.add("vulkan")
    if sys.platform == "darwin" and platform.machine() == "arm64":
        found.add("metal")
    return found


def _vendor(node: Path) -> str:
    try:
        return (node / "device" / "vendor").read_text().strip()
    except OSError:
        return ""


def present_tools() -> set[Target]:
    """Targets that can be compiled here."""
    return {target for target in TARGETS if target != "cpu" and find_tool(target) is not None}


def find_tool(target: Target) -> Path | None:
    """The compiler of a target's GPU code, or None when the target cannot be compiled."""
    if target == "cuda":
        return _which("nvcc", "/usr/local/cuda/bin", "/opt/cuda/bin")
    if target == "rocm":
        return _which("hipcc", "/opt/rocm/bin")
    if target == "vulkan":
        return _which("glslc") if _vulkan_header() >= _OLDEST_VULKAN_HEADER else None
    if target == "metal":
        return _which("xcrun") if sys.platform == "darwin" else None
    return find_compiler()


def _which(name: str, *folders: str) -> Path | None:
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), *folders])
    found = shutil.which(name, path=search)
    return Path(found) if found else None


def _vulkan_header() -> tuple[int, ...]:
    roots = [os.environ.get("VULKAN_SDK", ""), "/usr", "/usr/local"]
    for root in filter(None, roots):
        try:
            text = (Path(root) / "include" / "vulkan" / "vulkan_core.h").read_text()
        except OSError:
            continue
        return parse_vulkan_header(text)
    return ()


def parse_vulkan_header(text: str) -> tuple[int, ...]:
    """The version in `vulkan_core.h`, `(1, 3, 239)`; empty when it has none."""
    number = re.search(r"define VK_HEADER_VERSION (\d+)", text)
    complete = r"VK_HEADER_VERSION_COMPLETE VK_MAKE_API_VERSION\(\d+, *(\d+), *(\d+)"
    release = re.search(complete, text)
    if number is None or release is None:
        return ()
    return int(release[1]), int(release[2]), int(number[1])


def find_compiler() -> Path | None:
    """The C++ compiler that CMake would take."""
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        found = shutil.which(name)
        if found:
            return Path(found)
    return None


def require(target: Target) -> None:
    """Raise EngineMissingError, with what to install, unless `target` can be compiled here."""
    if find_compiler() is None:
        raise EngineMissingError(
            "no C++ compiler was found, and an engine is compiled for this machine",
            hint=_install("g++"),
        )
    if find_tool(target) is None:
        raise EngineMissingError(
            f"a build for {target} needs {_TOOLING[target]}", hint=f"`{mend_command(target)}`"
        )


def _install(package: str) -> str:
    if sys.platform == "darwin":
        return "`xcode-select --install`"
    if shutil.which("apt-get"):
        return f"`apt-get install {package}`"
    return f"install {package}"


def first_line_of(command: list[str]) -> str:
    """The first line a tool prints, as its version; empty when it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout.splitlines() or [""])[0].strip()
