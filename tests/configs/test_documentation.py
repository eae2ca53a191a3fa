import importlib.util
from pathlib import Path

from dinov2.configs import shipped_configs
from dinov2.configs.schema import walk

DOCS = Path(__file__).parents[2] / "docs"
_spec = importlib.util.spec_from_file_location("make_configuration", DOCS / "make_configuration.py")
make_configuration = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_configuration)

TEXT = make_configuration.PAGE.read_text()


def test_the_tables_are_those_of_the_schema_and_the_defaults_of_today():
    assert make_configuration.page(TEXT) == TEXT, "run: python docs/make_configuration.py"


def test_every_key_is_documented_with_a_meaning():
    documented = {line.split("`")[1]: line for line in TEXT.splitlines() if line.startswith("| `")}
    for key, _ in walk():
        assert len(documented[key].split("|")[4].strip()) > 5, key


def test_every_preset_for_training_is_listed():
    for name in shipped_configs():
        if name.startswith("train/"):
            assert f"`{name}`" in TEXT
