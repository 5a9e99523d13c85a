"""The settings of train.py as the page has them: of which recipe, which are changed, and whether each
can be what it is.

    choice = Choice('config/quick.py', {'max_iters': '30'})
    choice.arguments()              # ['config/quick.py', '--max_iters=30'], for train.py
    problem_with(SETTINGS['max_iters'], 'many')     # the configurator's sentence; '' if it is right
    profile_settings('8 GB', 'gpt') # what a profile of a machine sets

What is there, with default and comment, stands in train.py alone; what a recipe sets, in its file.
"""
import os
from functools import lru_cache

from mambino.configurator import from_text, run_config, settings_of
from mambino.serve import launch
from mambino.serve.told import Refused, told

SCRIPT = launch.script_path('train.py')
NOT_HERE = ('out_dir', 'eval_only', 'report', 'profile')   # which the page sets, or which are for a terminal
KINDS = ('mamba', 'gpt', 'hybrid')
# of a machine: the ending of its recipes, '' for none; what is set besides
PROFILES = {
    'this machine': ('', {}),
    'CPU laptop': ('quick', {}),
    '4 GB': ('8gb', {'vram': '4'}),
    '6 GB': ('8gb', {'vram': '6'}),
    '8 GB': ('8gb', {}),
    '12 GB': ('12gb', {}),
    '16 GB': ('16gb', {}),
    '24 GB': ('24gb', {}),
    '32 GB': ('32gb', {}),
    '48 GB': ('48gb', {}),
}


@lru_cache(None)
def all_settings():
    """{name: Setting} of train.py's settings that the page shows."""
    return {setting.name: setting for setting in settings_of(SCRIPT) if setting.name not in NOT_HERE}


def text_of(value):
    """A value as a person types it."""
    if value is None:
        return ''
    if isinstance(value, bool):
        return str(value).lower()
    return f'{value:g}' if isinstance(value, float) and float(f'{value:g}') == value else str(value)


def problem_with(setting, text):
    """What is wrong with a setting's text; '' if nothing."""
    try:
        with told(400):
            from_text(text, setting.default, f'{setting.name}={text}')
        return ''
    except Refused as refusal:
        return str(refusal)


# --- recipes --------------------------------------------------------------------------------------

def recipes():
    """Paths of the recipes, those here and those beside the scripts: config/quick.py, …"""
    names = {}
    for folder in ('config', launch.script_path('config')):
        try:
            found = sorted(os.listdir(folder))
        except OSError:
            continue
        for name in found:
            if name.endswith('.py') and not name.startswith('_'):
                names.setdefault(name, os.path.join(folder, name))
    return [names[name] for name in sorted(names)]


def recipe_of(name):
    """The path of the recipe that is called so, 'quick'; '' if there is none."""
    return next((path for path in recipes() if os.path.basename(path) == f'{name}.py'), '')


def values_in(recipe):
    """{name: value} that a recipe sets. Refused if it is not one of recipes(), or cannot be read."""
    if not recipe:
        return {}
    if recipe not in recipes():
        raise Refused(f'{recipe}: no such recipe')
    defaults = {setting.name: setting.default for setting in settings_of(SCRIPT)}
    with told(400):
        return run_config(recipe, defaults, defaults, {'__file__': SCRIPT})


def opening_comment(recipe):
    """What a recipe says of itself: its first lines of comment."""
    lines = []
    try:
        with open(recipe, encoding='utf-8') as f:
            for line in f:
                if not line.startswith('#'):
                    break
                lines.append(line[1:].strip())
    except (OSError, ValueError):
        pass
    return '\n'.join(lines)


def profile_recipe(profile, kind):
    """(recipe, {name: text} besides) of a machine of this profile, for a kind of model."""
    ending, besides = PROFILES[profile]
    if not ending:
        return '', {'model': kind}
    if ending == 'quick':
        return recipe_of('quick'), {'model': kind}
    return recipe_of(f'{kind}_{ending}'), dict(besides)


def profile_settings(profile, kind):
    """[(name, value as text, comment), …] of what a profile sets."""
    recipe, besides = profile_recipe(profile, kind)
    values = {name: text_of(value) for name, value in values_in(recipe).items()} | besides
    known = all_settings()
    return [(name, text, known[name].comment) for name, text in values.items() if name in known]


# --- what is chosen -------------------------------------------------------------------------------

class Choice:
    """A recipe, and what of its settings is changed. changed: {name: text}."""

    def __init__(self, recipe='', changed=None):
        self.changed = {}
        self.take(recipe)
        for name, text in (changed or {}).items():
            self.set(name, text)

    def take(self, recipe):
        """Another recipe: what is changed stays, where it is still a change. Refused if it cannot be read."""
        self.base = {name: text_of(setting.default) for name, setting in all_settings().items()}
        self.base |= {name: text_of(value) for name, value in values_in(recipe).items() if name in self.base}
        self.recipe = recipe
        for name, text in list(self.changed.items()):
            self.set(name, text)

    def set(self, name, text):
        """Gives a setting a value; that of the recipe is no change."""
        if name not in self.base:
            return
        if text == self.base[name]:
            self.changed.pop(name, None)
        else:
            self.changed[name] = text

    def value(self, name):
        return self.changed.get(name, self.base[name])

    def problems(self):
        """{name: sentence} of what is changed and cannot be."""
        found = {name: problem_with(all_settings()[name], text) for name, text in self.changed.items()}
        return {name: sentence for name, sentence in found.items() if sentence}

    def arguments(self):
        """For train.py: the recipe, and what is changed."""
        changed = {}
        for name, text in self.changed.items():
            is_open = all_settings()[name].default is None
            changed[name] = 'none' if is_open and not text else text
        return [*filter(None, [self.recipe]), *launch.flags(changed)]
