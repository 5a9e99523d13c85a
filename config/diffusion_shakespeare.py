# Characters of Shakespeare with holes: a model that finds hidden ones with both sides in view.
#   32 sequences x 128 characters = 4,096 tokens a step; 800 steps: the text 3.3 times
# first: python prepare.py input.txt --tokenizer=char --out=data/shakespeare_char
# Val loss, a bound, of one seed: <= 2.414 (200 steps), 2.247 (400), 2.128 (600), 2.028 (800), +- 0.013 by the draws of
#   holes; ten minutes on two cores without AVX-512 that did other work too. The rate was not swept.
# then: python sample.py --out_dir=out-diffusion-shakespeare --start='To be [...20...] question'
out_dir = 'out-diffusion-shakespeare'
dataset = 'shakespeare_char'

objective = 'masked'        # --objective=block writes text of any length, 16 characters at a time
model = 'gpt'               # --model=mamba and --model=hybrid work as well
n_layer = 4
n_embd = 192
n_head = 3
qk_norm = True
state_size = 32
block_size = 128

tokens_per_step = 4096
optimizer = 'muon'
learning_rate = 1e-2
max_iters = 800
schedule = 'wsd'
decay_fraction = 0.6
warmup_iters = 20
eval_interval = 200
log_interval = 50
