"""What `vectorkeep benchmark` measures: ratios, both sides in one run, on one server, over equal rows."""
