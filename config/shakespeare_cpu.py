# Characters of Shakespeare on a laptop's CPU, past the loss nanoGPT's CPU command reaches (1.88), in an eighth of its time.
#   18 sequences x 64 characters = 1,152 tokens a step; 240 steps see 276,000 characters, a quarter of the text
# first: python prepare.py input.txt --tokenizer=char --out=data/shakespeare_char
# Val loss, and seconds of one core for the whole process. 1,152 tokens a step: 200 steps 1.866 and 1.864 (two seeds) in 8.4 and 9.7,
# but 190 steps of a third seed 1.895, hence 240, a margin. 768 tokens: 240 steps 1.893 in 8.4, 300 steps 1.852 in 10.4; there a
# state of 16 gains no time (1.855), a rate of 2e-2 (1.871) and one layer of width 128 (1.927) are worse. 1,536: 150 steps 1.897.
# A GPT needs --model=gpt --max_iters=300 --rope_theta=100: 1.856 in 13.6 (260 steps: 1.884 in 12.8).
out_dir = 'out-shakespeare-cpu'
dataset = 'shakespeare_char'

model = 'mamba'         # --model=gpt and --model=hybrid work as well
n_layer = 2
n_embd = 96
n_head = 3
qk_norm = True
state_size = 32
block_size = 64

batch_size = 72         # 18 in a step; the evaluation takes 72 at once
tokens_per_step = 1152
optimizer = 'muon'
learning_rate = 1e-2
max_iters = 240
eval_interval = 240     # the whole val split, at the end
log_interval = 50
