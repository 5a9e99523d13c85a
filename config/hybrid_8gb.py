# A hybrid of 50M parameters for a card of 8 GB.
#   parameters   9 layers x (SSM 512 x 2192 + 1024 x 512, attention 4 x 512 x 512, SwiGLU 3 x 512 x 1408) = 43M,
#                embedding 512 x vocabulary (16,384: 8M)
#   at rest      51M x 16 bytes (fp32 weight, gradient, two AdamW moments) = 0.8 GB
#   activations  about 90 KB a token and layer in bf16: 4 x 1024 tokens x 9 layers = 3.3 GB (counted, not measured);
#                --batch_size=2 makes the same steps with half of that
#   a step       4 sequences x 1024 tokens x 32 micro-batches = 131,072 tokens
out_dir = 'out-hybrid-8gb'
model = 'hybrid'
n_layer = 9
n_embd = 512
n_head = 8
window = 256
block_size = 1024

batch_size = 4
tokens_per_step = 2**17
learning_rate = 1e-3
max_iters = 8000        # 1.05 billion tokens, 20 a parameter (Hoffmann et al. 2022)
warmup_iters = 200
eval_interval = 500
eval_iters = 100
