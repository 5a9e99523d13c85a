"""Runs a chat template, which is a small program from outside: Jinja in a sandbox, as transformers
runs it, and with bounds on what it may build and how long it may take.

    text = render(template, dict(messages=[…], add_generation_prompt=True, bos_token='<s>'))

What an answer is, where a template says so by {% generation %} … {% endgeneration %}, is between
BEGIN and END in the text; who renders removes them. Whatever goes wrong is a ValueError of one
line.
"""
import datetime
import functools
import json
import re
import threading
import time

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from mambino.tokenizer_config import BEGIN, END, LONGEST_TEMPLATE

ROUNDS = 50_000         # of all loops together, and calls of macros; and one for each character that goes in
SECONDS = 10            # the longest a text may take
SIZE = 20_000_000       # characters and items that may be built, and so many times those that go in:
TIMES = 200
WIDEST = 10_000         # the largest number that a filter or a method takes, as a width
# of Jinja's filters those that no template needs, and that build much from little
LEFT_OUT = ('batch', 'center', 'filesizeformat', 'pprint', 'random', 'slice', 'urlencode', 'urlize', 'wordwrap',
            'xmlattr')
METHODS_LEFT_OUT = ('encode', 'expandtabs', 'maketrans', 'translate')
OF_LIST = 16            # what a list or dict costs besides its items
CONTAINERS = (list, tuple, dict, *(type(view) for view in ({}.keys(), {}.values(), {}.items())))
# filters that look at a container's items, and make no text of them
OF_ITEMS = ('count', 'd', 'default', 'dictsort', 'first', 'groupby', 'items', 'last', 'length', 'list', 'map', 'max',
            'min', 'reject', 'rejectattr', 'reverse', 'select', 'selectattr', 'sort', 'sum', 'unique')


class Budget(threading.local):
    """What a rendering may still use up."""
    rounds = 0
    size = 0
    until = 0.0
    sizes = {}

    def begin(self, size):
        self.rounds = ROUNDS + size
        self.size = SIZE + TIMES * size
        self.sizes = {}                         # of containers, by id: itself, that nobody else gets its id, and …
        self.until = time.monotonic() + SECONDS

    def take(self, size):
        self.size -= size
        if self.size < 0:
            raise SecurityError('it builds a text without end')
        if time.monotonic() > self.until:
            raise SecurityError('it does not come to an end')

    def tick(self):
        """A round of a loop, or a call. → '', so that a template may write it."""
        self.rounds -= 1
        if self.rounds < 0:
            raise SecurityError('it does not come to an end')
        self.take(0)
        return ''


BUDGET = Budget()


# --- what things cost -----------------------------------------------------------------------------

def size_of(value):
    """Characters, or items."""
    return len(value) if isinstance(value, (str, *CONTAINERS)) else 0


def measured(value):
    """(items, characters, levels) of a container and what is in it, one inside another, as often as
    it is there: a few lists that each hold the one before twice have very many. Known of each from
    then on, since no template changes one."""
    known = BUDGET.sizes.get(id(value))
    if known:
        return known[1:]
    parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    BUDGET.take(len(parts))
    items, characters, levels = OF_LIST + len(parts), 0, 1
    for part in parts:
        if isinstance(part, str):
            characters += len(part)
        elif isinstance(part, CONTAINERS):
            more_items, more_characters, more_levels = measured(part)
            items += more_items
            characters += more_characters
            levels = max(levels, 1 + more_levels)
    BUDGET.sizes[id(value)] = value, items, characters, levels
    return items, characters, levels


def take_all(value, in_text=False, indent=0):
    """Takes all that is in a container. in_text: with the characters of its texts, as where text is
    made of it; indent: for each line of that and each level."""
    if isinstance(value, CONTAINERS):
        items, characters, levels = measured(value)
        BUDGET.take(items * (1 + indent * levels) + (characters if in_text else 0))


def text_size(value):
    """Characters of a value as text, about."""
    if isinstance(value, CONTAINERS):
        return sum(measured(value)[:2])
    return len(value) if isinstance(value, str) else len(str(value))


def check_format(text, arguments):
    """A format, % or {}, may not be wide nor take the same long argument again and again."""
    if re.search(r'\d{5}|%[^a-z%]*\*|:[^{}:]*\{', text):
        raise SecurityError('it formats a value too wide')
    BUDGET.take((text.count('%') + text.count('{')) * sum(map(text_size, arguments)))


def check_call(name, subject, arguments):
    """What a method or filter of this name may build, from what it is called on and with."""
    for value in arguments:
        if isinstance(value, int) and abs(value) > WIDEST:
            raise SecurityError(f'it calls {name} with {value if abs(value) < 10**20 else "a huge number"}')
    if name == 'sum' and any(isinstance(value, CONTAINERS) for value in arguments):
        raise SecurityError('it adds up lists')
    if name in ('split', 'rsplit', 'splitlines') and isinstance(subject, str):
        BUDGET.take(8 * len(subject))           # many little texts
    elif name == 'replace' and len(arguments) >= 2 and isinstance(subject, str):
        old, new = str(arguments[0]), str(arguments[1])
        BUDGET.take(len(subject) + subject.count(old) * len(new))
    elif name == 'join':
        separator, parts = subject, arguments[0] if arguments else ''
        if not isinstance(subject, str) or not arguments or isinstance(arguments[0], str):
            separator, parts = (arguments[0] if arguments else ''), subject         # a filter's
        if hasattr(parts, '__len__'):
            BUDGET.take(len(parts) * len(str(separator)) + sum(map(size_of, parts)))
    elif name == 'indent' and isinstance(subject, str):
        width = arguments[0] if arguments else 4
        BUDGET.take(len(subject) + subject.count('\n') * (width if isinstance(width, int) else len(str(width))))
    elif name == 'format' and isinstance(subject, str):
        check_format(subject, arguments)


def guarded(name, function):
    """A filter of Jinja's that counts what it builds."""
    passes = getattr(function, 'jinja_pass_arg', None) is not None      # the environment, or the like, first

    @functools.wraps(function)
    def call(*args, **kwargs):
        subject, *arguments = args[passes:]
        BUDGET.take(size_of(subject))       # it may go through all of it
        for value in (subject, *arguments, *kwargs.values()) if name not in OF_ITEMS else ():
            take_all(value, in_text=True)
        check_call(name, subject, [*arguments, *kwargs.values()])
        result = function(*args, **kwargs)
        BUDGET.take(size_of(result))
        take_all(result)
        return result
    return call


def guarded_test(function):
    """A test of Jinja's, in which time counts: a filter may ask it of each of many."""
    @functools.wraps(function)
    def call(*args, **kwargs):
        BUDGET.take(1)
        return function(*args, **kwargs)
    return call


def to_be_shown(value):
    """A value of which text is to be made."""
    take_all(value, in_text=True)
    return value


def joined(parts):
    """str.join, for which texts count."""
    parts = [str(to_be_shown(part)) for part in parts]
    BUDGET.take(sum(map(len, parts)))
    return ''.join(parts)


# --- Jinja, bounded -------------------------------------------------------------------------------

class Generator(CodeGenerator):
    """Jinja's compiler, whose ~ and whose lists count what they build, and whose comparisons and
    parts of texts see what time it is."""

    def visit_Concat(self, node, frame):
        self.write('environment.concat((')
        for part in node.nodes:
            self.visit(part, frame)
            self.write(', ')
        self.write('))')

    def write_within(self, beginning, visit, node, frame):
        """What a visit writes, behind a beginning that opens a bracket."""
        self.write(beginning)
        visit(node, frame)
        self.write(')')

    def visit_List(self, node, frame):
        self.write_within('environment.built(', super().visit_List, node, frame)

    def visit_Dict(self, node, frame):
        self.write_within('environment.built(', super().visit_Dict, node, frame)

    def visit_Tuple(self, node, frame):
        if node.ctx != 'load':              # names to assign to
            super().visit_Tuple(node, frame)
        else:
            self.write_within('environment.built(', super().visit_Tuple, node, frame)

    def visit_Compare(self, node, frame):
        self.write_within('(environment.watch() or ', super().visit_Compare, node, frame)

    def visit_Getitem(self, node, frame):
        self.write_within('(environment.watch() or ', super().visit_Getitem, node, frame)


class Sandbox(ImmutableSandboxedEnvironment):
    """transformers' environment, with bounds."""
    code_generator_class = Generator
    intercepted_binops = frozenset(['+', '*', '**', '%'])
    concat = staticmethod(joined)

    def _parse(self, source, name, filename):
        tree = super()._parse(source, name, filename)
        for kind in (nodes.For, nodes.Macro):
            for node in tree.find_all(kind):
                tick = nodes.Call(nodes.EnvironmentAttribute('tick'), [], [], None, None)
                node.body.insert(0, nodes.Output([tick]).set_lineno(node.lineno))
        return tree.set_environment(self)

    def tick(self):
        return BUDGET.tick()

    def watch(self):
        """→ None. What comes next takes a while of a long text."""
        BUDGET.take(1)

    def built(self, value):
        """A list, tuple or dict that a template writes."""
        take_all(value)
        return value

    def call_binop(self, context, operator, left, right):
        if operator == '%' and isinstance(left, str):
            check_format(left, right if isinstance(right, tuple) else (right,))
        elif operator == '**' and isinstance(left, int) and isinstance(right, int):
            BUDGET.take((left.bit_length() * abs(right)) ** 2)
        elif operator == '*':
            times = [value for value in (left, right) if isinstance(value, int)]
            texts = [value for value in (left, right) if not isinstance(value, (int, float))]
            BUDGET.take(sum(size_of(text) * max(0, n) for text in texts for n in times))
        else:
            BUDGET.take(size_of(left) + size_of(right))
        result = super().call_binop(context, operator, left, right)
        BUDGET.take(result.bit_length() ** 2 // 1000 if isinstance(result, int) else size_of(result))
        if operator == '+' and isinstance(result, (list, tuple)):       # one of all messages grows so by each
            one, other = measured(left), measured(right)
            BUDGET.sizes[id(result)] = (
                result, one[0] + other[0] - OF_LIST, one[1] + other[1], max(one[2], other[2]))
        return self.built(result)

    def is_safe_attribute(self, obj, attr, value):
        left_out = isinstance(obj, str) and attr in METHODS_LEFT_OUT
        return not left_out and super().is_safe_attribute(obj, attr, value)

    def call(self, context, function, *args, **kwargs):
        """As Jinja's `call`, of methods and macros."""
        subject = getattr(function, '__self__', None)
        if isinstance(subject, (str, list, dict)):
            check_call(function.__name__, subject, [*args, *kwargs.values()])
        take_all([args, kwargs])        # which may become a tuple and a dict
        result = super().call(context, function, *args, **kwargs)
        BUDGET.take(size_of(result))
        return result

    def wrap_str_format(self, value):
        wrapper = super().wrap_str_format(value)
        if wrapper is None:
            return None

        def call(*args, **kwargs):
            check_format(value.__self__, [*args, *kwargs.values()])
            return wrapper(*args, **kwargs)
        return call


class Answers(Extension):
    """{% generation %}: what is in it is an answer."""
    tags = {'generation'}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
        return nodes.CallBlock(self.call_method('marked'), [], [], body).set_lineno(line)

    def marked(self, caller):
        return BEGIN + caller() + END


class Namespace(jinja2.utils.Namespace):
    """Jinja's, without names that begin with an underscore."""

    def __setitem__(self, name, value):
        if str(name).startswith('_'):
            raise SecurityError(f'it sets {name}')
        super().__setitem__(name, value)

    def __repr__(self):
        return '<Namespace>'                # whatever it holds


def raise_exception(message):
    """What a template calls to refuse a conversation."""
    raise jinja2.TemplateError(message)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """As transformers' filter: nothing is escaped for HTML."""
    if indent is not None:
        take_all(value, indent=indent if isinstance(indent, int) else len(str(indent)))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(form):
    """Today, for templates that say it."""
    check_format(form, ())
    return datetime.datetime.now().strftime(form)


@functools.lru_cache(maxsize=16)
def compiled(template):
    """The template as Jinja has it. ValueError where it is none."""
    if len(template) > LONGEST_TEMPLATE:
        raise ValueError(f'its chat template has {len(template):,} characters, more than {LONGEST_TEMPLATE:,}')
    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[Answers, loopcontrols],
                      finalize=to_be_shown)
    filters = {**sandbox.filters, 'tojson': to_json}
    sandbox.filters = {name: guarded(name, function) for name, function in filters.items() if name not in LEFT_OUT}
    sandbox.tests = {name: guarded_test(function) for name, function in sandbox.tests.items()}
    del sandbox.globals['lipsum']
    sandbox.globals |= dict(raise_exception=raise_exception, strftime_now=strftime_now, namespace=Namespace)
    BUDGET.begin(len(template))         # of constants
    try:
        return sandbox.from_string(template)
    except Exception as error:          # Jinja's, and Python's where it nests too deep
        raise ValueError(f'its chat template cannot be read: {reason(error)}') from None


def render(template, variables):
    """The text that a template makes of its variables, plain values. ValueError: it is no template,
    it refuses them, or it does not come to an end."""
    program = compiled(template)
    BUDGET.begin(weight(variables))
    try:
        return joined(program.generate(variables))
    except Exception as error:          # whatever a program does wrong
        raise ValueError(f'its chat template refuses this conversation: {reason(error)}') from None


def weight(value):
    """The characters in plain values, one inside another."""
    if isinstance(value, dict):
        return sum(weight(part) + len(str(key)) for key, part in value.items())
    if isinstance(value, list):
        return sum(map(weight, value))
    return len(value) if isinstance(value, str) else 1


def reason(error):
    """What an error says, in a line."""
    line = (str(error).strip() or type(error).__name__).split('\n')[0][:200]
    return line if isinstance(error, jinja2.TemplateError) else f'{type(error).__name__}: {line}'
