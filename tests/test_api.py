"The ten names at the top: light to import, callable as documented."

import doctest
import subprocess
import sys
import tempfile
from dataclasses import replace

import pytest
import torch

import nanomoe


def test_importing_is_light():
    "No torch, and nothing of ours, before a name is used."
    look = (
        'import sys, nanomoe; print([name for name in sys.modules if name == "torch" or '
        'name.startswith("nanomoe.")])'
    )
    done = subprocess.run([sys.executable, '-c', look], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'


@pytest.mark.parametrize('name', nanomoe.__all__)
def test_the_examples_in_the_docstrings_run(name):
    "PRESETS is a dictionary: its example stands in the package's docstring."
    found = nanomoe if name == 'PRESETS' else getattr(nanomoe, name)
    documented = found.train if name == 'train' else found
    names = dict(nanomoe=nanomoe, torch=torch, tempfile=tempfile, replace=replace, PRESETS=nanomoe.PRESETS)
    (example,) = doctest.DocTestFinder(recurse=False).find(documented, name, globs=names)
    assert example.examples
    said = []
    outcome = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.append)
    assert outcome.failed == 0, ''.join(said)


def test_an_unknown_name_is_reported_with_those_there_are():
    with pytest.raises(AttributeError, match='it offers ModelConfig, TrainConfig, PRESETS'):
        nanomoe.Gpt
    assert set(nanomoe.__all__) <= set(dir(nanomoe))


def test_the_module_train_can_be_called():
    "`nanomoe.train` is a module, because `python -m nanomoe.train` is a command, and it trains when called."
    from nanomoe import train

    assert nanomoe.train is train and callable(train) and train.main
