import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest

from dinov2 import __version__, cli
from dinov2.configs import ConfigError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def command(monkeypatch):
    """A sub-command `fake` that does what the test says."""

    def install(action):
        monkeypatch.setitem(cli.COMMANDS, "fake", ("dinov2_fake_command", "for this test"))
        monkeypatch.setitem(sys.modules, "dinov2_fake_command", types.SimpleNamespace(main=action))

    return install


def test_help_names_every_command_with_what_it_does(capsys):
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    for name, (_, what) in cli.COMMANDS.items():
        assert f"  {name}" in said
        assert what in said
    assert max(map(len, said.splitlines())) <= 100


def test_no_command_shows_the_help_and_fails(capsys):
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().out


def test_help_needs_no_torch():
    heavy = "{'torch', 'omegaconf', 'numpy'} & {*sys.modules}"
    code = f"import sys; from dinov2.cli import main; main(['--help']); sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


def test_python_m_dinov2_is_the_command():
    result = subprocess.run([sys.executable, "-m", "dinov2", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"dinov2 {__version__}\n")


@pytest.mark.parametrize(("word", "hint"), [("trian", "did you mean `dinov2 train`?"), ("xyzzy", "commands: ")])
def test_an_unknown_command_suggests_the_nearest(word, hint, capsys):
    assert cli.main([word]) == 2
    assert hint in capsys.readouterr().err


def test_arguments_reach_the_command_and_its_answer_comes_back(command):
    got = []
    command(lambda argv: got.append(argv) or 7)
    assert cli.main(["fake", "--out", "x", "train.seed=1"]) == 7
    assert got == [["--out", "x", "train.seed=1"]]
    command(lambda argv: None)
    assert cli.main(["fake"]) == 0


@pytest.mark.parametrize("error", [ConfigError(["a.b=1 is wrong: c"]), ValueError("no"), FileNotFoundError("no file")])
def test_a_mistake_of_the_user_is_one_message_without_a_traceback(error, command, capsys):
    def fail(argv):
        raise error

    command(fail)
    assert cli.main(["fake"]) == 2
    said = capsys.readouterr().err
    assert str(error) in said
    assert "Traceback" not in said
    assert cli.main(["--debug", "fake"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_error_of_ours_keeps_its_traceback(command):
    def fail(argv):
        raise RuntimeError("a bug")

    command(fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["fake"])


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_exists_and_explains_itself(name, capsys):
    module = importlib.import_module(cli.COMMANDS[name][0])
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    assert end.value.code == 0
    assert "usage: dinov2 " + name in capsys.readouterr().out
