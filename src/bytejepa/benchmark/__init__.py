"""Speed: what the fast path gains over the plain one, and where the time goes."""
