"""The calls that decode.py writes down are those that native.cpp replays."""
import re
from pathlib import Path

import pytest

from mambino.kernels import native
from mambino.sample import decode
from mambino.weights import checkpoint

pytestmark = pytest.mark.skipif(native.library() is None, reason='no C++ compiler')
KINDS = [
    ('gpt', dict(n_head=2)),
    ('gpt', dict(n_head=2, qk_norm=True)),
    ('mamba', dict(version=1)),
    ('mamba', dict(head_dim=16, state_size=16)),
    ('mamba', dict(version=3, head_dim=16, state_size=16)),
    ('hybrid', dict(n_head=2, ssm_head_dim=16, state_size=16)),
    ('hybrid', dict(n_head=2, ssm_head_dim=16, state_size=16, layers='d')),
]


def test_the_functions_and_their_arguments_are_those_that_replay_knows():
    folder = Path(native.SOURCE).parent
    text = '\n'.join(path.read_text('utf-8') for path in folder.glob('cpp/*.h'))
    replayed = re.findall(r'case (\d+): a \+= invoke\((\w+), a\)', text)
    assert replayed == [(str(i), name) for i, name in enumerate(decode.FUNCTIONS)]
    declarations = re.findall(r'API (\w+)(?:##kind)?\(([^)]*)\)', text)      # some are made for several types
    declared = {name: len(arguments.split(',')) for name, arguments in declarations}
    called = set()
    for kind, fields in KINDS:
        net = checkpoint.build(kind, dict(fields, n_layer=1, n_embd=32, vocab_size=50))
        for function, *arguments in decode.calls(net, 0, 'x', 'x'):
            if function in decode.FUNCTIONS:
                called.add(function)
                assert len(arguments) == declared[function], function
    assert called == set(decode.FUNCTIONS)
