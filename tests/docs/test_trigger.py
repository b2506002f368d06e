"""The examples of docs/trigger.md are what the service takes."""

import re
from pathlib import Path

from automerge.trigger.config import KfpRunner, load_config
from automerge.trigger.template import check_template

PAGE = Path(__file__).parents[2] / "docs" / "trigger.md"


def test_configuration_and_template(tmp_path: Path) -> None:
    config, template = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "trigger.yaml").write_text(config)
    (tmp_path / "digits.yaml").write_text(template)
    loaded = load_config(tmp_path / "trigger.yaml")
    assert isinstance(loaded.runner, KfpRunner)
    [rule] = loaded.rules
    check_template(rule)
