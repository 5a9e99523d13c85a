"""Puts the project root on sys.path, so that the tests import the scripts as they lie."""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
