// The parts of the models that are no plain matrix products, for a CPU: each in one pass over
// memory, its sums in registers. native.py compiles this file where there is a compiler; what
// the functions compute is said, with the papers, where the models define it.
//
// Numbers are fp32, in functions whose name ends in _bf16 some are that, and a row's elements lie
// side by side; `s...` is the distance from one row to the next. A function does items lo to hi
// of its task, so that threads share it, each with a number of its own; what several threads
// would add to the same place, each adds to a copy of its own, and the caller sums the copies.
// Those of steps.h do all of their task, and share it among threads themselves.
//
// B batch, T time, H heads, G key heads or groups, P head size, N state size, E inner width, Q
// chunk, S cache slots.
#include "cpp/vectors.h"        // L numbers at once: load, store, sum, exp, sigmoid, softplus
#include "cpp/products.h"       // matrix products, transposes
#include "cpp/elementwise.h"    // SwiGLU, RoPE, norms, the loss
#include "cpp/heads.h"          // the gate of heads
#include "cpp/convolution.h"
#include "cpp/mamba1.h"
#include "cpp/mamba2.h"
#include "cpp/mamba3.h"
#include "cpp/delta.h"          // the gated delta rule
#include "cpp/attention.h"
#include "cpp/threads.h"
#include "cpp/tokens.h"         // rows of x as 16-bit integers
#include "cpp/matrices.h"       // fp32, bf16, int8 and int4 matrices by a few vectors
#include "cpp/tiles.h"          // and by many
#include "cpp/caches.h"         // attention of one token to the keys and values so far
#include "cpp/steps.h"          // one token
#include "cpp/sorting.h"        // what may be drawn

extern "C" I lanes() { return L; }
