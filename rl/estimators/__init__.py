"""How a log-prob is obtained: the one box that diffusion adds to policy-gradient RL."""
