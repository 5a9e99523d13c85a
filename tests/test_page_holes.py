"""The page in a real browser, with a model that fills holes."""

import pytest
from helpers.browser import choose
from helpers.holes import runs_in

PROMPT = 'at [...600...] in [...9...]en'


@pytest.fixture(scope='module')
def served_folder(trained_runs, tmp_path_factory):
    """With the runs masked, which fills holes, and char, which does not."""
    with runs_in(tmp_path_factory.mktemp('served'), trained_runs, ['masked']) as folder:
        return folder


def open_panel(page, server, model):
    page.goto(server.at('/generate'))
    choose(page, 'model', model)


def test_a_hole_is_filled_before_ones_eyes(page, server):
    """With the marker explained, and what stands around it in its place."""
    open_panel(page, server, 'char')
    page.get_by_test_id('holes-note').wait_for(state='hidden')
    page.get_by_test_id('sampler').wait_for(state='hidden')
    choose(page, 'model', 'masked')
    assert '[...20...]' in page.get_by_test_id('holes-note').text_content()
    page.get_by_test_id('sessions').wait_for(state='hidden')
    page.get_by_test_id('prompt').fill(PROMPT)
    page.evaluate("""() => {
        window.frames_seen = [];
        new MutationObserver(() => {
            const text = document.querySelector('[data-testid=answer-text]')?.textContent;
            if (text && text !== window.frames_seen.at(-1)) window.frames_seen.push(text);
        }).observe(document.body, {childList: true, subtree: true, characterData: true});
    }""")
    page.get_by_test_id('start').click()
    page.get_by_test_id('answer-state').get_by_text('full length').wait_for()
    whole = page.get_by_test_id('answer-text').text_content()
    assert whole.startswith('at ') and whole[603:607] == ' in ' and whole.endswith('en') and '░' not in whole
    frames = [frame for frame in page.evaluate('window.frames_seen') if len(frame) == len(whole)]
    hidden = [frame.count('░') for frame in frames]
    assert len(set(hidden)) > 3 and hidden == sorted(hidden, reverse=True) and hidden[-1] == 0
    assert '609 tokens' in page.get_by_test_id('answer-state').text_content()
    assert not page.get_by_test_id('go-on').is_visible()
    page.get_by_test_id('as-request').click()
    said = page.get_by_test_id('request').text_content()
    assert '"sampler": "first"' in said and 'stop' not in said and 'session' not in said
    page.get_by_test_id('stop-texts').fill('ab|en')
    page.get_by_test_id('request').get_by_text('"ab",').wait_for()
    choose(page, 'model', 'char')
    page.get_by_test_id('sessions').click()
    page.get_by_test_id('session').fill('tale')
    page.get_by_test_id('request').get_by_text('"session": "tale"').wait_for()


def test_what_it_does_not_do_is_said(page, server):
    open_panel(page, server, 'masked')
    page.get_by_test_id('mode').get_by_text('Chat').click()
    page.get_by_test_id('prompt').fill('tin')
    page.get_by_test_id('start').click()
    page.get_by_test_id('trouble').get_by_text('answers no messages: choose Text').wait_for()
    open_panel(page, server, 'char')
    page.get_by_test_id('mode').get_by_text('Text').click()
    page.get_by_test_id('prompt').fill('a [...5...]')
    page.get_by_test_id('start').click()
    page.get_by_test_id('trouble').get_by_text('learned to go on alone').wait_for()
    page.goto(server.at('/perplexity'))
    choose(page, 'model', 'masked')
    page.get_by_test_id('text').fill('tin')
    page.get_by_test_id('score').click()
    page.get_by_test_id('trouble').get_by_text('--score=FILE says a bound').wait_for()
