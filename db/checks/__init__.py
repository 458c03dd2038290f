"""The doctor's checks, a file for each topic. Each is a short function that yields what it found."""

from . import cache, embedded, indexes, keeping, rows, schema, server, sessions, storage
from .base import Check

# In the order in which they are made and told: what others need comes first.
CHECKS: tuple[Check, ...] = (
    *embedded.CHECKS,
    *server.CHECKS,
    *schema.CHECKS,
    *indexes.CHECKS,
    *rows.CHECKS,
    *sessions.CHECKS,
    *storage.CHECKS,
    *server.SCHEMA_CHECKS,
    *cache.CHECKS,
    *cache.SCHEMA_CHECKS,
    *keeping.CHECKS,
)
# The name of the last finding where some could not be made.
NOT_LOOKED_AT = "not looked at"
