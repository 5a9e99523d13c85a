"""Puts the project root on sys.path, so that the tests import the scripts as they lie."""
import os
import sys

os.environ.setdefault('GOMP_SPINCOUNT', '10000')  # see train.py: two processes share the cores

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes more than ten seconds')
