# A hybrid of 152M parameters for a card of 16 GB: 13 layers of width 768.
#   at rest      152M x 16 bytes (fp32 weight, gradient, two AdamW moments) = 2.3 GB
#   activations  149 KB a token and layer in bf16: 2 x 2048 tokens x 13 layers = 7.4 GB
#   at the peak  10.2 GB without gradient checkpointing, for a vocabulary of 16,384,
#                of some 14.4 GB that such a card has free
#                (all counted by mambino/train/memory.py, not measured)
#   a step       128 sequences x 2048 tokens = 262,144 tokens
#   the run      11,500 steps x 262,144 tokens = 3.0 billion, 20 a parameter (Hoffmann et al. 2022)
out_dir = 'out-hybrid-16gb'

model = 'hybrid'
size = '150m'
block_size = 2048

vram = '16'             # GB: as many sequences at once as fit
tokens_per_step = 128 * 2048
optimizer = 'adamw'
schedule = 'cosine'
learning_rate = 6e-4
max_iters = 11500
warmup_iters = 200
eval_interval = 500
eval_iters = 200        # sequences
