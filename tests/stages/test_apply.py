"""`automerge apply`: checkpoints on disk become one, by a recipe or by one technique; no spec, no data, no model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from automerge.checkpoint.open import open_checkpoint
from automerge.merging.apply import merge_tensor
from automerge.merging.recipe import Recipe

AUTOMERGE = Path(sys.executable).with_name("automerge")
FLOAT_NAMES = ["embed.weight", "norm.weight", "mlp.weight"]


def weights(seed: int) -> dict[str, torch.Tensor]:
    base = torch.Generator().manual_seed(0)
    own = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (64, 16), "mlp.weight": (48, 16), "norm.weight": (16,)}
    return {
        name: (torch.randn(shape, generator=base) + 0.1 * seed * torch.randn(shape, generator=own)).bfloat16()
        for name, shape in shapes.items()
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base and two sources, each a folder as the transformers library writes it."""
    for seed, name in enumerate(("base", "maths", "code")):
        (tmp_path / name).mkdir()
        save_file(weights(seed), tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"of": name}))
        (tmp_path / name / "notes.md").write_text("not for the model")
    return tmp_path


def apply(
    folder: Path, *options: str, program: tuple[str, ...] = (str(AUTOMERGE),)
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*program, "apply", "--source", "maths=maths", "--source", "code=code", "--output", "out", *options],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


TIES = (
    "--technique",
    "ties",
    "--base",
    "base",
    "--set",
    "density=0.4",
    "--weight",
    "maths=0.3",
    "--weight",
    "code=0.7",
)


def test_one_technique_for_all_tensors(folder: Path) -> None:
    done = apply(folder, *TIES)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "merged into out: model.safetensors, config.json, recipe.json\n"
    recipe = Recipe.read(folder / "out" / "recipe.json")
    (block,) = recipe.blocks
    merged = load_file(folder / "out" / "model.safetensors")
    for name, base in weights(0).items():
        expected = merge_tensor(name, block, base, {"maths": weights(1)[name], "code": weights(2)[name]})
        assert torch.equal(merged[name], expected), name
    assert json.loads((folder / "out" / "config.json").read_text()) == {"of": "maths"}
    assert recipe.sources[1].digest == open_checkpoint(folder / "code").digest()


def test_the_recipe_rebuilds_the_same_bytes(folder: Path) -> None:
    assert apply(folder, *TIES).returncode == 0
    first = (folder / "out" / "model.safetensors").read_bytes()
    (folder / "out" / "recipe.json").rename(folder / "kept.json")
    (folder / "out" / "model.safetensors").unlink()
    assert apply(folder, "--recipe", "kept.json", "--base", "base", "--threads", "1").returncode == 0
    assert (folder / "out" / "model.safetensors").read_bytes() == first


def test_equal_weights_unless_some_are_given(folder: Path) -> None:
    assert apply(folder, "--technique", "linear").returncode == 0
    merged = load_file(folder / "out" / "model.safetensors")
    mean = (weights(1)["mlp.weight"].float() + weights(2)["mlp.weight"].float()) / 2
    assert torch.equal(merged["mlp.weight"], mean.bfloat16())


def test_private_tensors_become_heads_and_shards_have_an_index(folder: Path) -> None:
    done = apply(folder, "--technique", "linear", "--private", "embed.*", "--max-shard-bytes", "1000")
    assert done.returncode == 0, done.stderr
    written = sorted(path.relative_to(folder / "out").as_posix() for path in (folder / "out").rglob("*.safetensors"))
    assert written[:2] == ["heads/code.safetensors", "heads/maths.safetensors"]
    assert sorted(open_checkpoint(folder / "out").tensors) == ["mlp.weight", "norm.weight"]
    assert torch.equal(
        load_file(folder / "out" / "heads" / "code.safetensors")["embed.weight"], weights(2)["embed.weight"]
    )


def test_batchnorm_is_averaged_by_name(folder: Path) -> None:
    for name, value in (("base", 1.0), ("maths", 2.0), ("code", 4.0)):
        state = {"bn.running_var": torch.full((3,), value), "bn.num_batches_tracked": torch.tensor(int(value))}
        save_file({**state, "w": torch.ones(2)}, folder / name / "model.safetensors")
    done = apply(
        folder, "--technique", "task_arithmetic", "--base", "base", "--weight", "maths=5", "--weight", "code=5"
    )
    assert done.returncode == 0, done.stderr
    merged = load_file(folder / "out" / "model.safetensors")
    assert merged["bn.running_var"].tolist() == [3, 3, 3]
    assert merged["bn.num_batches_tracked"].item() == 4


def test_an_input_that_changed_is_refused_unless_told_not_to_look(folder: Path) -> None:
    assert apply(folder, *TIES).returncode == 0
    (folder / "out" / "recipe.json").rename(folder / "kept.json")
    save_file(weights(5), folder / "code" / "model.safetensors")
    refused = apply(folder, "--recipe", "kept.json", "--base", "base")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: source 'code': the checkpoint code is not the one of the recipe (digest ")
    assert apply(folder, "--recipe", "kept.json", "--base", "base", "--no-verify").returncode == 0


def test_a_merge_into_the_folder_of_an_input(folder: Path) -> None:
    done = apply(folder, "--technique", "linear", "--output", "maths")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((folder / "maths" / "config.json").read_text()) == {"of": "maths"}
    assert Recipe.read(folder / "maths" / "recipe.json").blocks[0].technique == "linear"


def test_an_adapter_brings_its_tokenizer_and_the_base_its_configuration(folder: Path) -> None:
    lora = folder / "maths"
    (lora / "model.safetensors").unlink()
    (lora / "config.json").unlink()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["mlp"]}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    (lora / "tokenizer.json").write_text("{}")
    factors = {"lora_A": torch.ones(2, 16), "lora_B": torch.ones(48, 2)}
    save_file(
        {f"base_model.model.mlp.{name}.weight": tensor for name, tensor in factors.items()},
        lora / "adapter_model.safetensors",
    )
    done = apply(folder, "--technique", "linear", "--base", "base", "--weight", "maths=1", "--weight", "code=0")
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "recipe.json",
        "tokenizer.json",
    ]
    assert json.loads((folder / "out" / "config.json").read_text()) == {"of": "base"}
    merged = load_file(folder / "out" / "model.safetensors")
    assert torch.equal(merged["mlp.weight"], (weights(0)["mlp.weight"].float() + 2 * 2).bfloat16())


def test_a_folder_that_was_there_stays_and_hides_no_error(folder: Path) -> None:
    (folder / "out").mkdir()
    bad = {**weights(2), "norm.weight": torch.full((16,), float("nan")).bfloat16()}
    save_file(bad, folder / "code" / "model.safetensors")
    for output in ("out", "."):
        done = apply(folder, "--technique", "linear", "--output", output)
        assert done.returncode == 2
        assert done.stderr.startswith("error: source 'code', tensor 'norm.weight': 16 NaN and 0 infinite values;")
    assert (folder / "out").is_dir()


def test_one_of_two_tied_names_is_private(folder: Path) -> None:
    for seed, name in ((1, "maths"), (2, "code")):
        shared = torch.full((4, 2), float(seed))
        (folder / name / "model.safetensors").unlink()
        torch.save({"lm_head.weight": shared, "model.embed.weight": shared}, folder / name / "pytorch_model.bin")
    done = apply(folder, "--technique", "linear", "--private", "lm_head*")
    assert (done.returncode, done.stderr) == (0, "")
    assert load_file(folder / "out" / "model.safetensors")["model.embed.weight"][0].tolist() == [1.5, 1.5]
    assert load_file(folder / "out" / "heads" / "code.safetensors")["lm_head.weight"][0].tolist() == [2, 2]


def test_too_many_files_for_the_process(folder: Path) -> None:
    many = {f"w{index:02}": torch.ones(4) for index in range(40)}
    for name in ("maths", "code"):
        (folder / name / "model.safetensors").unlink()
        for tensor, value in many.items():
            save_file({tensor: value}, folder / name / f"{tensor}.safetensors")
        index = {"weight_map": {tensor: f"{tensor}.safetensors" for tensor in many}}
        (folder / name / "model.safetensors.index.json").write_text(json.dumps(index))
    limited = ("bash", "-c", f'ulimit -n 32; exec {AUTOMERGE} "$@"', "bash")
    done = apply(folder, "--technique", "linear", "--no-verify", program=limited)
    assert done.returncode == 2
    assert "cannot be opened (Too many open files); check the file, and the limit of open files" in done.stderr
    assert not (folder / "out").exists()

    for name in ("maths", "code"):
        (folder / name / "model.safetensors.index.json").unlink()
        save_file(many, folder / name / "model.safetensors")
    done = apply(folder, "--technique", "linear", "--max-shard-bytes", "16", program=limited)
    assert done.returncode == 2
    assert done.stderr.startswith("error: out: 40 files cannot be open at once (Too many open files); choose larger")


def test_merging_floats_needs_no_torch(folder: Path) -> None:
    """Its import alone costs more time and memory than most merges."""
    code = (
        "import sys; sys.argv[0] = 'automerge'; from automerge.cli import main\n"
        "try: main()\nfinally: print([m for m in ('torch', 'numpy', 'kfp') if m in sys.modules])"
    )
    for technique in ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs"):
        done = apply(folder, "--technique", technique, "--base", "base", program=(sys.executable, "-c", code))
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("\n[]\n"), technique


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((), "error: a merge is by a recipe or by one technique; pass either --recipe or --technique"),
        (("--technique", "tie"), "error: unknown technique 'tie'; did you mean 'ties'?"),
        (
            ("--technique", "ties"),
            "error: technique 'ties': technique 'ties' needs a base; name the sources' common ancestor as base or use "
            "'linear'",
        ),
        (
            ("--technique", "ties", "--base", "base", "--set", "densty=0.5"),
            "error: technique 'ties' has no hyperparameter 'densty'; did you mean 'density'?",
        ),
        (
            ("--technique", "ties", "--base", "base", "--set", "density=1.5"),
            "error: technique 'ties': hyperparameter 'density' is 1.5; choose a value between 1.52588e-05 and 1",
        ),
        (
            ("--technique", "linear", "--weight", "maths=much"),
            "error: --weight maths=much: is not a number; write one, such as 0.3",
        ),
        (
            ("--technique", "linear", "--weight", "math=1"),
            "error: technique 'linear': weight for the unknown source 'math'; did you mean 'maths'?",
        ),
        (
            ("--technique", "linear", "--set", "x"),
            "error: --set 'x' is not of the form NAME=VALUE; see `automerge apply --help`",
        ),
        (
            ("--technique", "linear", "--source", "org/model=code"),
            "error: --source org/model=...: is no name of a source; use up to 63 letters, digits, '_', '.' and '-', "
            "and another name than 'base'",
        ),
        (
            ("--recipe", "none.json", "--seed", "0"),
            "error: --seed says nothing beside --recipe; the recipe says it",
        ),
        (("--recipe", "none.json"), "error: none.json: no such file; `automerge search` writes it"),
        (
            ("--recipe", "none.json", "--dtype", "float16"),
            "error: --dtype says nothing beside --recipe; the recipe says it",
        ),
        (
            ("--technique", "linear", "--source", "third=nowhere"),
            "error: nowhere: no such file or folder; check the path",
        ),
        (
            ("--technique", "linear", "--source", "maths=code"),
            "error: --source names 'maths' twice; see `automerge apply --help`",
        ),
    ],
)
def test_what_a_user_gets_wrong(folder: Path, options: tuple[str, ...], sentence: str) -> None:
    done = apply(folder, *options)
    assert done.returncode == 2
    assert done.stderr.strip() == sentence
    assert not (folder / "out").exists()


def test_checkpoints_of_different_shapes(folder: Path) -> None:
    save_file({**weights(2), "norm.weight": torch.ones(17).bfloat16()}, folder / "code" / "model.safetensors")
    done = apply(folder, "--technique", "linear")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: tensor 'norm.weight' has the shapes [16] in source 'maths', [17] in source 'code'; declare it"
    )
    assert not (folder / "out").exists()
