"""The API as OpenAI's own client sees it."""
import pytest
from helpers.served import serving


@pytest.fixture(scope='module')
def server(trained_runs):
    with serving(trained_runs, out_dir='bpe') as server:
        yield server


def test_models(server):
    pytest.importorskip('openai')
    assert {model.id for model in server.client().models.list()} == {'bpe', 'char'}
