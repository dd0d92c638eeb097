"""Studies: which difference made a difference. Plans, paired runs, statistics, results."""
