"""The innermost loops. rounding, descent and scale_search hold one loop each, in torch; c_loops and triton_loops hold the same three
for processors and for GPUs, where one fused kernel replaces many small operations; dispatch picks."""
