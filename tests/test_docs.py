"""The commands and examples of README and docs are valid, links work, and generated pages are up to date."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from openmae.checkpoints.format import CheckpointInfo, save_backbone
from openmae.cli.main import _parse, main
from openmae.models.build import ModelConfig, build_encoder
from openmae.spec.architectures import ARCHITECTURES
from openmae.spec.costs import COSTS
from openmae.spec.describe import fields, sections, traits
from openmae.spec.load import load_spec

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {page.name: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))}
DEPLOYMENT, MIGRATION = PAGES["deployment.md"], PAGES["migrating-from-tao.md"]
LIBRARIES = re.findall(r"### (.*?)\n\n```python\n(.*?)```", DEPLOYMENT, flags=re.DOTALL)


# Values of the examples, and what the tests use to take seconds instead of hours.
_SHORTER = {
    r"train\.num_epochs=\d+": "train.num_epochs=1",
    r"train\.optim\.warmup_epochs=\d+": "train.optim.warmup_epochs=0",
    r"dataset\.batch_size=\d+": "dataset.batch_size=8",
    r"model\.arch=vit_small_patch16": "model.arch=convnextv2_atto",
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], flags=re.DOTALL)


def mae_commands(page: str) -> list[list[str]]:
    """Return the arguments of every mae command in the page's blocks of shell commands."""
    text = "\n".join(blocks(page, "bash") + blocks(page, "sh")).replace("\\\n", " ")
    words = [shlex.split(line, comments=True) for line in text.splitlines()]
    found = [line[line.index("mae") + 1 :] for line in words if "mae" in line]
    return [line[: line.index(">")] if ">" in line else line for line in found]


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_keys_exist(page: str) -> None:
    for argv in mae_commands(page):
        args = _parse(argv)
        for override in getattr(args, "overrides", ()):
            key = override.partition("=")[0]
            assert key in fields(), f"{page}: {override}"


@pytest.mark.parametrize("page", PAGES)
def test_links_exist(page: str) -> None:
    folder = ROOT if page == "README.md" else DOCS
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        path, _, fragment = link.partition("#")
        if path.startswith("http"):
            continue
        target = folder / path if path else folder / page
        assert target.exists(), f"{page}: {link}"
        if fragment:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert fragment in map(anchor, headings), f"{page}: {link}"


def test_every_page_is_linked_from_readme() -> None:
    for page in PAGES.keys() - {"README.md"}:
        assert f"(docs/{page}" in PAGES["README.md"], page


def test_the_architecture_page_names_existing_modules_and_all_packages() -> None:
    page, source = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"), ROOT / "src" / "openmae"
    for package in (path.parent.name for path in source.glob("*/__init__.py")):
        assert f"| `{package}/` |" in page, package
    for path in re.findall(r"`([\w/]+\.py)`", page):
        assert list(source.rglob(path)) or (ROOT / path).exists(), path


def test_the_configuration_reference_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spec", "keys", "--markdown"]) == 0
    assert capsys.readouterr().out == PAGES["configuration.md"], "docs/configuration.md is stale: run `make docs`"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty current folder with `photos`, `labelled/train`, `labelled/val`, and a spec of a short run."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for part, count in (
        ("photos", 48),
        *((f"labelled/{p}/{c}", 16) for p in ("train", "val") for c in ("red", "green")),
    ):
        Path(part).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"{part}/{number}.jpg")
    Path("spec.yaml").write_text(
        "model: {arch: convnextv2_atto}\n"
        "dataset: {train_data_sources: labelled/train, val_data_sources: labelled/val, batch_size: 8,\n"
        "  num_workers_per_gpu: 0, augmentation: {input_size: 32}}\n"
        "train: {stage: finetune, num_epochs: 1}\n"
        "automl: {max_recommendations: 2}\n"
        "wandb: {enable: false}\n"
    )
    return tmp_path


def run(command: list[str], folder: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "OPENMAE_JOBS": str(folder / "jobs"), "WANDB_MODE": "disabled"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow(reason="runs every block of commands, which train")
@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md" and blocks(page, "bash")])
def test_shell_examples_run(page: str, folder: Path) -> None:
    if page == "deployment.md":
        run(["bash", "-euc", "mae train -e spec.yaml results_dir=runs/classes"], folder)
    for block in blocks(page, "bash"):
        for long, short in _SHORTER.items():
            block = re.sub(long, short, block)
        run(["bash", "-euc", block], folder)


@pytest.mark.slow(reason="trains twice")
def test_python_examples_run(folder: Path) -> None:
    for code in blocks("python-api.md", "python"):
        if "errors" in code or "Client" in code:  # the first must fail, the second needs a store: test_readme.py
            continue
        run([sys.executable, "-c", code.replace("num_epochs=20", "num_epochs=2")], folder)


def test_the_example_of_errors_and_models(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    for code in blocks("python-api.md", "python"):
        if "RunError" in code or "build_autoencoder" in code:
            exec(compile(code, "python-api.md", "exec"), {})
    out = capsys.readouterr().out
    assert "invalid input: " in out
    assert "hiera_tiny_224" in out


@pytest.mark.slow(reason="mypy reads the package and torch, a minute without its cache")
def test_examples_pass_mypy_strict(tmp_path: Path) -> None:
    for page in ("README.md", "python-api.md", "migrating-from-timm.md"):
        for number, code in enumerate(blocks(page, "python")):
            (tmp_path / f"{page.replace('-', '_').removesuffix('.md')}_{number}.py").write_text(code)
    mypy = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={ROOT}/.mypy_cache/examples"]
    options = ["--allow-untyped-calls", "--ignore-missing-imports"]  # timm and safetensors have no types for these
    files = sorted(map(str, tmp_path.glob("*.py")))
    done = subprocess.run([*mypy, *options, *files], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.integration
def test_weights_of_timm_are_accepted(folder: Path) -> None:
    (code,) = blocks("migrating-from-timm.md", "python")
    exec(compile(code, "migrating-from-timm.md", "exec"), {})
    weights = [
        "model.arch=vit_tiny_patch16",
        "train.pretrained_model_path=timm.safetensors",
        "train.optim.warmup_epochs=0",
    ]
    assert main(["train", "-e", "spec.yaml", *weights, "dataset.augmentation.input_size=32", "results_dir=runs"]) == 0


@pytest.mark.parametrize(("title", "code"), LIBRARIES, ids=[title.split()[0] for title, _ in LIBRARIES])
def test_the_backbone_loads_into_other_libraries(
    title: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = ModelConfig("convnextv2_atto", (64, 64))
    state = build_encoder(config).backbone.state_dict()
    save_backbone(tmp_path / "backbone.safetensors", state, CheckpointInfo("pretrain", config))
    names: dict = {}
    exec(compile(code, title, "exec"), names)
    stem = state["stem.0.weight"]
    assert any(value.shape == stem.shape and torch.equal(value, stem) for value in names["model"].parameters()), (
        f"{title}: the stem was not loaded"
    )
    model = names["model"].eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        output = model([images[0]])[0]["boxes"] if "torchvision" in title else model(images)
    assert {"timm": (1, 10), "Segmentation": (1, 5, 64, 64)}.get(title.split()[0], (len(output), 4)) == tuple(
        output.shape
    )


def test_every_architecture_has_its_timm_name_on_the_page() -> None:
    for name, row in ARCHITECTURES.items():
        expected = row.timm_name.split(".")[0]
        assert expected in (name, f"{name}_224"), f"docs/deployment.md: timm calls {name} {expected}"


def test_the_models_page_lists_every_architecture_and_its_defaults() -> None:
    page = PAGES["models.md"].split("\n## ")[0]
    assert f"one of {len(ARCHITECTURES)} architectures" in page
    for name, row in ARCHITECTURES.items():
        (line,) = (line for line in page.splitlines() if line.startswith("| ") and f"`{name}`" in line)
        assert f"| {row.mask_ratio} | {row.decoder_depth} block" in line, name
        assert f"width {row.decoder_embed_dim}" in line, name


def test_the_models_page_has_counted_costs_and_estimates_by_its_rule() -> None:
    """The estimate is the assumed share of an A100's peak, divided by the operations of a step."""
    page = PAGES["models.md"]
    shares = {"vit": 0.35, "hiera": 0.25, "convnextv2": 0.15}
    assert "35 %\n  for ViT, 25 % for Hiera and 15 % for ConvNeXt V2" in page
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]*) ?\| ([\d,]+) \|$", page, flags=re.MULTILINE)
    assert len(rows) == 10
    for name, parameters, step, _, estimate in rows:
        cost = COSTS[name]
        assert (float(parameters), float(step)) == (cost.parameters_m, cost.step_gflop), name
        expected = shares[ARCHITECTURES[name].family] * 312e12 / (cost.step_gflop * 1e9)
        assert int(estimate.replace(",", "")) == pytest.approx(expected, rel=0.05), name
    for name, step in re.findall(r"^\| `(\w+)` \| ([\d.]+) \| [\d.]+ \|$", page, flags=re.MULTILINE):
        assert float(step) == COSTS[name].step_gflop, name


def test_the_keys_and_defaults_of_the_migration_page_exist():
    """Names in code that look like keys are keys; what the table says of defaults is so."""
    named = set(re.findall(r"`((?:train|model|dataset|evaluate|inference|export|wandb)\.[a-z0-9_.]+)", MIGRATION))
    assert len(named) > 30
    assert not named - fields().keys() - sections() - {"dataset.segment"}
    spec = load_spec(
        {"model": {"arch": "vit_base_patch16"}, "train": {"stage": "finetune"}, "dataset": {"batch_size": 2}}
    )
    optim = spec.train.optim
    assert (optim.backbone_multiplier, optim.layer_decay, optim.momentum, optim.beta2) == (1.0, 0.75, 0.9, 0.999)
    assert (spec.train.keep_checkpoints, spec.model.mask_ratio, spec.model.drop_path_rate) == (3, 0.75, 0.1)
    assert (spec.model.decoder_depth, spec.model.decoder_embed_dim, spec.wandb.project) == (8, 512, "openmae")
    other = load_spec({"model": {"arch": "convnextv2_tiny"}})
    assert (other.model.mask_ratio, other.model.decoder_depth, other.train.optim.beta2) == (0.6, 1, 0.95)


def test_the_migration_page_names_what_tao_ignores():
    for key in fields():
        if not traits(key).ignored_by_tao:
            continue
        assert key in MIGRATION or key.rpartition(".")[2] in MIGRATION, f"{key} is not on the page"
