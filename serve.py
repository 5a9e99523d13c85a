"""Serves the models trained here: a page on which one prepares, trains, watches, generates and exports,
and an API that OpenAI's clients speak.

    python serve.py                                 # http://127.0.0.1:8000: page and API
    python serve.py --page=false --out_dir=out-mine # the API alone
    python serve.py --host=0.0.0.0 --api_key=…      # for others: never without a key

    a client ──► api ──► scheduler: one row of the model's state for each answer ──► tokens, streamed
    the page ──► files of a run ◄── train.py, a process of its own, which outlives this one

In mambino/serve/ api.py has what clients may ask for, guard.py who may ask, library.py the models,
scheduler.py how answers share one model, page/ what is seen.
"""
import os

os.environ.setdefault('GOMP_SPINCOUNT', '10000')  # see train.py

from mambino.configurator import configure, fail, require
from mambino.console import end_quietly

# --- what and where
out_dir = ''            # the model that answers where a request names none; '': the one trained last.
                        # All runs in the current folder are served beside it
host = '127.0.0.1'      # whom it listens to: this machine alone; 0.0.0.0: everybody, who knows the api_key
port = 8000
page = True             # the page at /; False: the API alone
api_key = ''            # what clients must know; better in the environment: MAMBINO_API_KEY
cors_origin = ''        # another page that may use the API from a browser, as http://localhost:3000
# --- the model
device = 'auto'         # 'cpu', 'cuda', 'cuda:1', 'mps'; auto: the best there is
dtype = 'auto'          # 'float32', 'bfloat16', 'float16'; auto: as sample.py
quantize = ''           # 'int8', 'int4', 'bfloat16': smaller weights; on a CPU also faster ones
adapters = ''           # out_dirs of adapters of out_dir's model, or folders of peft, each with its
                        # weight: out-a,out-b:0.5
memory = 0.0            # GB for models that are loaded, the one used last stays longest; 0: half of
                        # what is free
# --- answers
rows = 16               # that are generated side by side
queue = 64              # requests that may wait for a row; more are told to come back
kept_memory = 0.25      # GB for states after prompts and answers, so that no conversation is read twice
# --- limits of one request
max_tokens = 4096       # that are generated, at most
max_prompt = 65536      # tokens of a prompt, at most
max_body = 8.0          # MB
timeout = 600.0         # seconds from the request to its last token

# read before torch is there: a typo is told at once
end_quietly()
explicit = configure(globals(), positional=None)

require(globals(), {
    'from 0 to 65535; 0: any that is free': dict(port=0 <= port <= 65535),
    'from 1 to 256': dict(rows=1 <= rows <= 256),
    '0 or more': dict(queue=queue >= 0, memory=memory >= 0, kept_memory=kept_memory >= 0),
    'above 0': dict(max_tokens=max_tokens > 0, max_prompt=max_prompt > 0, max_body=max_body > 0, timeout=timeout > 0),
})
api_key = api_key or os.environ.get('MAMBINO_API_KEY', '')
if host not in ('127.0.0.1', 'localhost', '::1') and not api_key:
    fail(f'host={host}: whoever reaches this machine could use it, so it needs --api_key too (or MAMBINO_API_KEY in '
         'the environment)')

try:
    import fastapi  # noqa: F401
    import uvicorn
    if page:
        import nicegui  # noqa: F401
except ImportError as error:
    fail(f'{error.name} is not installed: pip install fastapi uvicorn nicegui (or: pip install --group serve); '
         '--page=false needs no nicegui')

from mambino.serve.api import Limits, make_app
from mambino.serve.library import Library
from mambino.serve.work import Room

# --- the models
library = Library('.', out_dir, device, dtype, quantize, adapters, memory, Room(rows, queue, kept_memory))
limits = Limits(max_tokens, max_prompt, int(max_body * 1e6), timeout)

# --- the API, and the page on it
app = make_app(library, limits, api_key, cors_origin)
if page:
    from mambino.serve.page.shell import add_page
    add_page(app, library)

uvicorn.run(app, host=host, port=port, log_level='warning')
