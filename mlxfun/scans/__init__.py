"""Which experts tell two data sets apart, and what one expert does."""
