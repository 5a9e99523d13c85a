"""The page in a real browser: its shell, and the panels on which a model is used."""
from helpers.browser import has_no_sideways_scroll

PLACES = ('start', 'machine', 'data', 'train', 'runs', 'generate', 'perplexity', 'export', 'server')


def address_of(place):
    return '/' if place == 'start' else f'/{place}'


# --- the shell ------------------------------------------------------------------------------------

def test_panels_have_addresses(page, server):
    """A link leads to each, a reload keeps it, and each has a title of its own."""
    page.goto(server.at())
    titles = set()
    for place in PLACES:
        page.get_by_test_id(f'go-{place}').click()
        page.wait_for_url(f'{server.url}{address_of(place)}')
        page.reload()
        assert page.get_by_test_id(f'go-{place}').get_attribute('aria-current') == 'page'
        titles.add(page.title())
    assert len(titles) == len(PLACES)


def first_paint(page):
    """Seconds from the request to when something is seen."""
    entries = 'performance.getEntriesByName("first-contentful-paint")'
    page.wait_for_function(f'{entries}.length')
    return page.evaluate(f'{entries}[0].startTime') / 1000


def test_first_paint(page, server):
    """Within two seconds, twice that on a machine that does other things besides."""
    page.goto(server.at())
    paints = [first_paint(page)]
    page.reload()
    paints.append(first_paint(page))
    assert min(paints) < 2 and max(paints) < 4, paints


def test_theme_is_remembered(page, server):
    page.emulate_media(color_scheme='dark')
    page.goto(server.at())
    theme = 'document.documentElement.dataset.theme'
    assert page.evaluate(theme) == 'dark'
    page.get_by_test_id('theme').click()
    assert page.evaluate(theme) == 'light'
    page.reload()
    page.get_by_test_id('theme').wait_for()
    assert page.evaluate(theme) == 'light'
    page.wait_for_function('document.body.classList.contains("body--light")')


def test_a_narrow_window(page, server):
    page.set_viewport_size(dict(width=360, height=700))
    for place in PLACES:
        page.goto(server.at(address_of(place)))
        page.get_by_test_id('theme').wait_for()
        assert has_no_sideways_scroll(page), place


def test_the_keyboard_skips_to_the_content(page, server):
    page.goto(server.at())
    page.get_by_test_id('theme').wait_for()
    page.keyboard.press('Tab')
    assert page.evaluate('document.activeElement.className') == 'skip'
    page.keyboard.press('Enter')
    page.wait_for_function('document.activeElement.id === "content"')
