"""A product that served for days, and a home folder behind a first pass of `freshrank label` over its logs."""

import shutil

import pytest
from label_world import FIRST_MS, label_world, make_served


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Logs and releases; who changes them works on a copy."""
    return make_served(tmp_path_factory.mktemp("served"), seed=11, steps=120)


@pytest.fixture(scope="module")
def first_home(world, tmp_path_factory):
    """Behind a pass of FIRST_MS."""
    home = tmp_path_factory.mktemp("first")
    label_world(world, home, until_ms=FIRST_MS)
    return home


@pytest.fixture
def home(first_home, tmp_path):
    """A copy of it."""
    shutil.copytree(first_home, home := tmp_path / "home")
    return home
