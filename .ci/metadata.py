"""What a wheel says of itself and stands elsewhere: requirements.txt is what it requires, and each group of
pyproject.toml is an extra of the same name: pip install '.[serve]'. Hatchling calls it, see pyproject.toml.

    requirements.txt, [dependency-groups] ──► Requires-Dist, Provides-Extra
"""
import os

from hatchling.metadata.plugin.interface import MetadataHookInterface

try:
    import tomllib
except ImportError:  # Python 3.10; hatchling brings it
    import tomli as tomllib


def group_of(groups, name):
    """The requirements of a group, with those of the groups that it includes."""
    requirements = []
    for entry in groups[name]:
        requirements += group_of(groups, entry['include-group']) if isinstance(entry, dict) else [entry]
    return requirements


class Requirements(MetadataHookInterface):
    """See the top of the file."""

    def update(self, metadata):
        with open(os.path.join(self.root, 'requirements.txt'), encoding='utf-8') as f:
            lines = [line.partition('#')[0].strip() for line in f]
        with open(os.path.join(self.root, 'pyproject.toml'), 'rb') as f:
            groups = tomllib.load(f)['dependency-groups']
        metadata['dependencies'] = [line for line in lines if line]
        metadata['optional-dependencies'] = {name: group_of(groups, name) for name in groups}
