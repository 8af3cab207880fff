"""Speed and memory: ratios within one interleaved run, medians, the machine named."""
