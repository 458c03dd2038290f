"""A store under load: many threads in several processes write and search at once, for a time."""
