"""What every registry must do: run it over yours.

def test_my_registry(tmp_path):
    check_registry(lambda: MyRegistry(RegistrySpec(kind="mine", uri=...)), tmp_path)
"""

# ruff: noqa: S101 - a conformance suite speaks by assertions

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from automerge.documents import digest_of
from automerge.errors import RegistryError
from automerge.registry.registry import Registry, RegistryEntry

MakeRegistry = Callable[[], Registry]


def check_registry(make_registry: MakeRegistry, folder: Path) -> None:
    """Run every check below.

    Args:
        make_registry: returns a new handle on one and the same registry; it may hold other models already.
        folder: an empty folder for the files.

    Raises:
        AssertionError: the registry does not keep the contract of :class:`automerge.registry.registry.Registry`.
    """
    for check in (
        check_round_trip,
        check_same_recipe_is_registered_once,
        check_models_and_recipes_are_apart,
        check_awkward_values,
        check_failed_registration_leaves_no_version,
        check_failed_download_leaves_nothing,
        check_concurrent_registration,
        check_documents,
        check_aliases,
    ):
        place = folder / check.__name__
        place.mkdir()
        check(make_registry, place)


def check_round_trip(make_registry: MakeRegistry, folder: Path) -> None:
    """What was registered is found by another handle and downloaded byte by byte."""
    entry = make_entry(folder)
    assert make_registry().find(entry.model, entry.recipe_digest) is None
    made = make_registry().register(entry)
    assert made.created
    assert made.model == entry.model
    assert made.version and made.uri and made.url
    found = make_registry().find(entry.model, entry.recipe_digest)
    assert found == made.model_copy(update={"created": False})
    fetched = make_registry().download(entry.model, made.version, folder / "new" / "fetched")
    assert fetched == folder / "new" / "fetched"
    expected = {f"weights/{path.relative_to(entry.weights)}": path for path in _files(entry.weights)}
    expected |= {f"onnx/{path.name}": path for path in entry.onnx}
    expected |= {f"documents/{path.name}": path for path in entry.documents}
    assert sorted(str(path.relative_to(fetched)) for path in _files(fetched)) == sorted(expected)
    for name, path in expected.items():
        assert (fetched / name).read_bytes() == path.read_bytes(), name


def check_same_recipe_is_registered_once(make_registry: MakeRegistry, folder: Path) -> None:
    """The second registration of a recipe returns the first version, whatever else differs."""
    entry = make_entry(folder)
    first = make_registry().register(entry)
    (folder / "other.html").write_text("other")
    second = make_registry().register(replace(entry, documents=[folder / "other.html"], tags={"spec": "other"}))
    assert first.created
    assert second == first.model_copy(update={"created": False})


def check_models_and_recipes_are_apart(make_registry: MakeRegistry, folder: Path) -> None:
    """Another recipe is another version; the same recipe under another model is its own."""
    entry = make_entry(folder)
    other_recipe = replace(entry, recipe_digest=digest_of("another recipe"))
    other_model = replace(entry, model=_fresh_name())
    made = [make_registry().register(item) for item in (entry, other_recipe, other_model)]
    assert all(version.created for version in made)
    assert made[0].version != made[1].version
    assert made[2].model == other_model.model
    for item, version in zip((entry, other_recipe, other_model), made, strict=True):
        found = make_registry().find(item.model, item.recipe_digest)
        assert found is not None
        assert (found.model, found.version) == (version.model, version.version)


def check_awkward_values(make_registry: MakeRegistry, folder: Path) -> None:
    """Long values, odd names, numbers that are not finite and a model without ONNX are no reason to fail."""
    entry = replace(
        make_entry(folder),
        onnx=[],
        tags={"long": "x" * 50_000, "empty": "", "with 'quotes' = and % signs": "naïve 'quoted' \"text\"", "ü": "ü"},
        params={f"block-{number}.weight[{name}]": "1" for number in range(120) for name in "ab"} | {"long": "y" * 9000},
        metrics={"accuracy@5 (top)": 0.5, "loss": float("nan"), "infinite": float("inf"), "x" * 400: 1.0},
        description="# Merged\n\n| a | b |\n|---|---|\n",
    )
    made = make_registry().register(entry)
    assert make_registry().download(entry.model, made.version, folder / "fetched").is_dir()


def check_failed_registration_leaves_no_version(make_registry: MakeRegistry, folder: Path) -> None:
    """A file that is missing is an error, no version can be seen afterwards, and a second attempt succeeds."""
    entry = make_entry(folder)
    broken = replace(entry, documents=[*entry.documents, folder / "missing.json"])
    try:
        make_registry().register(broken)
    except RegistryError as error:
        assert "missing.json" in str(error)
    else:
        raise AssertionError("an entry with a missing file was registered")
    assert make_registry().find(entry.model, entry.recipe_digest) is None
    assert make_registry().register(entry).created


def check_failed_download_leaves_nothing(make_registry: MakeRegistry, folder: Path) -> None:
    """A version that is not there, and a folder that is not empty, are errors that write nothing."""
    entry = make_entry(folder)
    made = make_registry().register(entry)
    full = folder / "full"
    full.mkdir()
    (full / "mine").write_text("mine")
    for model, version, target in (
        (entry.model, "987654", folder / "fetched"),
        (_fresh_name(), "1", folder / "fetched"),
        (entry.model, made.version, full),
    ):
        try:
            make_registry().download(model, version, target)
        except RegistryError:
            pass
        else:
            raise AssertionError(f"download of {model} {version} to {target} did not fail")
    assert not (folder / "fetched").exists()
    assert [path.name for path in _files(full)] == ["mine"]


def check_concurrent_registration(make_registry: MakeRegistry, folder: Path) -> None:
    """Several at once, each by a handle of its own, all get the same version, and it is the only one that stays."""
    entry = make_entry(folder)
    count = 4
    with ThreadPoolExecutor(count) as pool:
        made = list(pool.map(lambda _: make_registry().register(entry), range(count)))
    assert len({version.version for version in made}) == 1
    assert sum(version.created for version in made) == 1
    found = make_registry().find(entry.model, entry.recipe_digest)
    assert found is not None
    assert found.version == made[0].version
    assert make_registry().download(entry.model, found.version, folder / "fetched").is_dir()


def check_documents(make_registry: MakeRegistry, folder: Path) -> None:
    """A document of a version is read by its name; one that it does not have is none."""
    entry = make_entry(folder)
    made = make_registry().register(entry)
    for path in entry.documents:
        assert make_registry().read_document(entry.model, made.version, path.name) == path.read_bytes(), path.name
    assert make_registry().read_document(entry.model, made.version, "missing.json") is None
    try:
        make_registry().read_document(entry.model, "987654", "recipe.json")
    except RegistryError:
        pass
    else:
        raise AssertionError("a document of a version that is not there was read")


def check_aliases(make_registry: MakeRegistry, folder: Path) -> None:
    """An alias is on one version, or on none; several are apart, and a model that is not there has none."""
    entry = make_entry(folder)
    assert make_registry().with_alias(entry.model, "champion") is None
    first = make_registry().register(entry)
    second = make_registry().register(replace(entry, recipe_digest=digest_of("another recipe")))
    assert make_registry().with_alias(entry.model, "champion") is None
    make_registry().set_alias(entry.model, "champion", first.version)
    make_registry().set_alias(entry.model, "other", first.version)
    assert make_registry().with_alias(entry.model, "champion") == first.model_copy(update={"created": False})
    for _ in range(2):
        make_registry().set_alias(entry.model, "champion", second.version)
        assert make_registry().with_alias(entry.model, "champion") == second.model_copy(update={"created": False})
    assert make_registry().with_alias(entry.model, "other") == first.model_copy(update={"created": False})
    try:
        make_registry().set_alias(entry.model, "champion", "987654")
    except RegistryError:
        pass
    else:
        raise AssertionError("a version that is not there got an alias")
    assert make_registry().with_alias(entry.model, "champion") == second.model_copy(update={"created": False})


def make_entry(folder: Path) -> RegistryEntry:
    """A small entry under a name not used before, its files in ``folder``."""
    weights = folder / "merged"
    (weights / "heads").mkdir(parents=True)
    (weights / "model.safetensors").write_bytes(bytes(range(256)))
    (weights / "heads" / "low.safetensors").write_bytes(b"low")
    onnx = folder / "merged.onnx"
    onnx.write_bytes(b"onnx")
    documents = []
    for name in ("recipe.json", "evaluation.json", "report.html"):
        (folder / name).write_text(f"<!-- {name} -->")
        documents.append(folder / name)
    return RegistryEntry(
        model=_fresh_name(),
        recipe_digest=digest_of(str(folder)),
        weights=weights,
        onnx=[onnx],
        documents=documents,
        tags={"spec": "digits", "pr.low": "97.20", "gate": "pass"},
        params={"encoder.technique": "ties"},
        metrics={"pr_mean": 97.2},
        description="A merged model.",
    )


def _fresh_name() -> str:
    return f"conformance-{uuid.uuid4().hex[:12]}"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
