# Characters of Shakespeare on a laptop's CPU, past the loss nanoGPT's CPU command reaches (1.88),
# in an eighth of its time.
#   18 sequences x 64 characters = 1,152 tokens a step; 200 steps: a quarter of the text
# first: python prepare.py input.txt --tokenizer=char --out=data/shakespeare_char
# Val loss, and seconds of the whole process on two cores: 1.860, 1.864, 1.892 (three seeds) in 7.7;
# with 220 steps 1.843, -, 1.879 in 8.6; with 240 steps 1.831, 1.844 in 9.0: all with a cosine. With a
# linear decay, as now, in bf16, two other seeds 1.850, 1.864 (over the last 0.6) and 1.853, 1.865 (0.8);
# a cosine's 1.864, 1.892. What was no better: 768 or 1,536 tokens a step, a state of 16, a rate of
# 2e-2, one layer of 128, a weight decay of 0, a linear decay in 170 steps (1.872, 1.892).
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
max_iters = 200
schedule = 'wsd'
decay_fraction = 0.7
warmup_iters = 10
eval_interval = 400     # the whole val split, at the end
log_interval = 50
