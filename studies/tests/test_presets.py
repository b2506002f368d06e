"""What the study of the presets makes of searches that did not end."""

from types import SimpleNamespace

import pytest

from automerge.spec import load_spec
from studies import presets


def test_an_interrupted_search_makes_no_row_and_is_made_again(tmp_path, monkeypatch):
    spec = load_spec(presets.ROOT / "examples" / "digits" / "spec.yaml", environment={"DIGITS": str(tmp_path)})
    setting = presets.Setting("digits", 0, spec, tmp_path)
    begun = []

    def interrupted(spec, inputs, segmentation, folder):
        begun.append(folder.exists())
        folder.mkdir()
        (folder / presets.RECIPE).write_text("the best so far")
        return SimpleNamespace(stopped="interrupted")

    monkeypatch.setattr(presets, "search", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            presets._searched(SimpleNamespace(setting=setting), "best")
    assert begun == [False, False]
