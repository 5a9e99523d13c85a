# Characters of Shakespeare on a laptop's CPU, past the loss nanoGPT's CPU command reaches (1.88),
# in a tenth of its time.
#   18 sequences x 64 characters = 1,152 tokens a step; 180 steps: a fifth of the text
# first: python prepare.py input.txt --tokenizer=char --out=data/shakespeare_char
# Val loss of five seeds: 1.864, 1.847, 1.877, 1.873, 1.883; in 170 steps 1.865 to 1.888, in 200 1.846. What was
# no better: 768 or 1,536 tokens a step, a state of 16, a rate of 2e-2, one layer of 128, a weight decay of 0,
# a cosine (1.864, 1.892 in 200 steps), a linear decay of all steps.
# --model=gpt --max_iters=300 --rope_theta=100: 1.856 in 12.6. --model=hybrid --max_iters=220: 1.807
#   in 15.7.
out_dir = 'out-shakespeare-cpu'
dataset = 'shakespeare_char'

model = 'mamba'         # --model=gpt and --model=hybrid work as well
n_layer = 2
n_embd = 96
n_head = 3
qk_norm = True
state_size = 32
block_size = 64

batch_size = 18         # all that a step has
tokens_per_step = 1152
optimizer = 'muon'
learning_rate = 1e-2
max_iters = 180
schedule = 'wsd'
decay_fraction = 0.7
warmup_iters = 10
eval_interval = 400     # the whole val split, at the end
log_interval = 50
