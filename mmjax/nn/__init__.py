"""Mathematics that no paper owns, and the only home of logical axis names."""
