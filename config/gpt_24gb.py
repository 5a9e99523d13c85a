# A GPT of 396M parameters for a card of 24 GB: 30 layers of width 1024.
#   at rest      396M x 16 bytes (fp32 weight, gradient, two AdamW moments) = 5.9 GB
#   activations  54 KB a token and layer in bf16: 8 x 1024 tokens x 30 layers = 12.5 GB
#   at the peak  19.2 GB without gradient checkpointing, for a vocabulary of 16,384,
#                of some 22.2 GB that such a card has free
#                (all counted by mambino/train/memory.py, not measured)
#   a step       512 sequences x 1024 tokens = 524,288 tokens
#   the run      15,000 steps x 524,288 tokens = 7.9 billion, 20 a parameter (Hoffmann et al. 2022)
out_dir = 'out-gpt-24gb'

model = 'gpt'
size = '400m'
block_size = 1024
qk_norm = True

vram = '24'             # GB: as many sequences at once as fit
tokens_per_step = 512 * 1024
optimizer = 'adamw'
schedule = 'cosine'
learning_rate = 3e-4
max_iters = 15000
warmup_iters = 200
eval_interval = 500
eval_iters = 400        # sequences
