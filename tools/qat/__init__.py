"""Training of tiny-wan with quantized weights, so that what 2 and 4 bits lose is learnt back."""
