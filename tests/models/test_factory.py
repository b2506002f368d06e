"""A model from a Python callable."""

import sys
from pathlib import Path

import pytest
import torch

from automerge.errors import ModelError
from automerge.models.factory import FactoryArchitecture
from automerge.spec import ModelSpec

HERE = str(Path(__file__).parent)


def _architecture(target, **update):
    return FactoryArchitecture(ModelSpec(kind="factory", target=target, python_path=[HERE], **update), {})


def test_a_source_may_have_its_own_arguments():
    architecture = _architecture("architectures:small", arguments={"classes": 4})
    assert architecture.build("a", {}).head.out_features == 4
    module = architecture.build("a", {"classes": 6})
    assert module.head.out_features == 6
    assert not module.training
    assert architecture.companion_files(Path(HERE)) == []


def test_on_the_meta_device():
    with torch.device("meta"):
        module = _architecture("architectures:Small").build("a", {})
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("architectures.small", "'architectures.small' is not of the form 'module:callable'"),
        ("architecturez:small", "there is no module 'architecturez'"),
        ("architectures:smal", "has no 'smal'; did you mean 'small'"),
        ("architectures:constant", "is no callable but of type int"),
        ("architectures:not_a_module", "returned str, not a torch.nn.Module"),
        ("architectures:fails", "raised ValueError: no such width; mend"),
    ],
)
def test_each_wrong_target_is_one_sentence(target, sentence):
    with pytest.raises(ModelError) as error:
        _architecture(target).build("a", {})
    assert str(error.value).startswith("model.target: ")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_an_argument_that_the_factory_does_not_take():
    with pytest.raises(ModelError, match=r"with the arguments \{'clases': 3\} raised TypeError"):
        _architecture("architectures:small").build("a", {"clases": 3})


def test_a_module_that_cannot_be_imported(tmp_path):
    (tmp_path / "broken_model.py").write_text("import nowhere_to_be_found\n")
    (tmp_path / "raising_model.py").write_text("1 / 0\n")

    def build(target, path):
        return FactoryArchitecture(ModelSpec(kind="factory", target=target, python_path=[str(path)]), {}).build("a", {})

    with pytest.raises(ModelError, match="broken_model imports 'nowhere_to_be_found', which is not installed"):
        build("broken_model:f", tmp_path)
    with pytest.raises(ModelError, match="importing 'raising_model' raised ZeroDivisionError"):
        build("raising_model:f", tmp_path)
    with pytest.raises(ModelError, match=r"model.python_path: .*missing is not a folder"):
        build("broken_model:f", tmp_path / "missing")


def test_two_specs_may_have_modules_of_one_name(tmp_path):
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "same_name.py").write_text(f"import torch\ndef build():\n    return torch.nn.Linear(1, {number})\n")
        spec = ModelSpec(kind="factory", target="same_name:build", python_path=[str(folder)])
        for _ in range(2):
            assert FactoryArchitecture(spec, {}).build("a", {}).out_features == number


def test_a_module_hidden_by_an_installed_one(tmp_path):
    (tmp_path / "json.py").write_text("")
    spec = ModelSpec(kind="factory", target="json:build", python_path=[str(tmp_path)])
    with pytest.raises(ModelError, match=r"'json' in .* is hidden by an installed module"):
        FactoryArchitecture(spec, {}).build("a", {})
    assert str(tmp_path) not in sys.path
