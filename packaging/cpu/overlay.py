"""Make a CPU environment for a vLLM that has no CPU build yet, over an environment of the one that has.

    .venv/bin/python packaging/cpu/overlay.py 0.33 .venv-0.33

The new environment has vLLM's Python files of that version, the compiled extensions of the environment whose Python
runs this, and everything else from there. So it shows how vLLM's Python code changed, and nothing about its C++
kernels. The environment below is only read, and has to stay where it is.

What the newer vLLM requires and the environment below lacks is installed without requirements of its own. An
environment that was made once stays with its version: delete it to have a newer patch release.
"""

import argparse
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import parse_wheel_filename

# What vLLM's CUDA build requires for GPUs alone, by the beginning of the name. torch stays the CPU build.
FOR_GPUS = (
    "apache-tvm",
    "fastsafetensors",
    "flashinfer",
    "humming",
    "instanttensor",
    "nvidia",
    "nvtx",
    "pynv",
    "quack",
    "tilelang",
    "tokenspeed",
    "torch",
)
COMPILED = (".so", ".h", ".hpp", ".cu", ".cuh")
BASE = Path(sysconfig.get_path("purelib"))


def download(requirement: str, folder: Path) -> Path:
    """The wheel that pip chooses."""
    only_wheels = ["--no-deps", "--only-binary", ":all:", "--dest", folder]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *only_wheels, requirement], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def create(environment: Path) -> Path:
    """A new environment behind whose own packages those of this one are found; returns the folder of its own."""
    if environment.exists() and not (environment / "pyvenv.cfg").exists():
        sys.exit(f"{environment} is not a virtual environment and would be replaced: name another folder.")
    venv.create(environment, clear=True, symlinks=True)
    (own,) = environment.glob("lib/python*/site-packages")
    # Not a plain path: editable installs are found through the .pth files of this environment.
    (own / "below.pth").write_text(f"import site; site.addsitedir({str(BASE)!r})\n")
    python = (environment / "bin" / "python").absolute()
    for script in Path(sys.executable).parent.iterdir():
        if not script.is_file():
            continue
        first, newline, rest = script.read_bytes().partition(b"\n")
        if first.startswith(b"#!") and b"python" in first and not (environment / "bin" / script.name).exists():
            made = environment / "bin" / script.name
            made.write_bytes(f"#!{python}".encode() + newline + rest)
            made.chmod(0o755)
    return own


def unpack(wheel: Path, own: Path) -> list[Requirement]:
    """vLLM's Python files, and extensions from the environment below; returns what this vLLM requires."""
    with zipfile.ZipFile(wheel) as files:
        names = [name for name in files.namelist() if name.startswith("vllm/") and not name.endswith(COMPILED)]
        files.extractall(own, names)
        (metadata,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        required = Parser().parsestr(files.read(metadata).decode()).get_all("Requires-Dist", [])
    for extension in (BASE / "vllm").rglob("*.so"):
        target = own / extension.relative_to(BASE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(extension, target)
    # The name under which vLLM looks itself up; its platform detection reads "cpu" in the version.
    _, number, _, _ = parse_wheel_filename(wheel.name)
    info = own / f"vllm-{number}+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}+cpu\n")
    return [Requirement(line) for line in required]


def missing(required: list[Requirement]) -> list[str]:
    """Requirements that the environment below does not meet."""
    found = []
    for requirement in required:
        if requirement.name.lower().startswith(FOR_GPUS) or not applies(requirement):
            continue
        try:
            met = requirement.specifier.contains(version(requirement.name), prereleases=True)
        except PackageNotFoundError:
            met = False
        if not met:
            found.append(f"{requirement.name}{requirement.specifier}")
    return found


def applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", help="of vLLM, such as 0.33 for the newest 0.33.x")
    parser.add_argument("environment", type=Path, help="the folder to make; an environment that is there is replaced")
    arguments = parser.parse_args()
    own = create(arguments.environment)
    with tempfile.TemporaryDirectory() as folder:
        wheel = download(f"vllm=={arguments.version}.*", Path(folder))
        lacking = missing(unpack(wheel, own))
    if lacking:
        pip = [sys.executable, "-m", "pip", "--python", arguments.environment / "bin" / "python"]
        subprocess.run([*pip, "install", "--quiet", "--no-deps", *lacking], check=True)
    print(f"{arguments.environment}: {wheel.name}, {', '.join(lacking) or 'no other package'}, the rest from {BASE}")


if __name__ == "__main__":
    main()
