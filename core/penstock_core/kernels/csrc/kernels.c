/* All kernels of one instruction set: compiled once for each, with -DISA=<name>. */
#include "attention.c"
#include "rows.c"
#include "linear.c"
#include "linear_int8.c"
#include "draw.c"
#include "decoder.c"
#include "draft.c"
#include "ranks.c"
