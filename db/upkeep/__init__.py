"""The steps of maintenance, by what they look after. `db.maintenance` runs them."""
