"""Training: Muon and AdamW, pure schedules, averages of weights, ranks, checkpoints, and the loop that joins them."""
