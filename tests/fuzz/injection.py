"""Strings that would break out of a statement, a pattern or a protocol, if they were ever part of one.

The classes are those of what the library talks to: SQL literals and identifiers (quotes, comments, stacked statements,
unions, tautologies, dollar quotes, E'' and U& escapes), the places of a statement where a value may end up (after
LIKE, in an array, as JSON, as a JSON path, in COPY's text form), the placeholders of psycopg, str.format and %, server
functions that read files, sleep, or change settings, `where`'s own operators, and Redis: its protocol, its
patterns, its keys of ours, Lua. Each closer goes before each payload; the rest stands for itself.
"""

_CLOSERS = ["'", '"', "')", "\\'", "'::text)", "']", "$$", "*/", "%' ", "\u02bc"]
_PAYLOADS = [
    "; DROP TABLE embeddings; --",
    " OR 1=1 --",
    " OR ''='",
    " UNION SELECT id, text, metadata FROM embeddings --",
    "; DELETE FROM chunks /*",
    "; UPDATE embeddings SET text = 'owned'; --",
    " || (SELECT string_agg(id, ',') FROM embeddings) || ",
    "; COMMIT; TRUNCATE embeddings CASCADE; BEGIN; --",
    "; SELECT pg_terminate_backend(pg_backend_pid()); --",
    "; COPY embeddings TO PROGRAM 'touch /tmp/owned'; --",
    "; SET ROLE postgres; ALTER ROLE CURRENT_USER SUPERUSER; --",
    "::jsonb @> '{}' --",
]
_ALONE = [
    # tautologies and arithmetic, without a quote
    "1 OR 1=1", "0 OR true", "NULL", "null OR true", "DEFAULT", "id", "embeddings.id", "target.id",
    "metadata -> 'a'", "(SELECT 1)", "CURRENT_USER", "version()", "1; DROP TABLE chunks", "--", "/*",
    "/* */", "#", ";", ";;", "-- \n; SELECT 1",
    # escapes and encodings
    "\\", "\\\\", "\\'; DROP TABLE chunks; --", "E'\\x27'", "U&'\\0027'", "\\u0027 OR 1=1",
    "%27%20OR%201=1", "&#39; OR 1=1", "\u00bf' OR 1=1", "\ufe63\ufe63", "\u2019 OR \u20191\u2019=\u20191",
    "\x1a' OR 1=1", "\x7f'", "\r\n'; --\r\n", "\t'\t",
    # dollar quotes and anonymous blocks
    "$$ OR 1=1 $$", "$x$; DROP TABLE chunks; $x$", "DO $$BEGIN DELETE FROM embeddings; END$$", "$1", "$0",
    "$1::text", "$99",
    # placeholders and formats
    "%s", "%(id)s", "%b", "%t", "%%", "%", "%s%s%s%s", "%(ids)b", "%n", "{}", "{0}", "{table}",
    "{condition.sql}", "{{}}", "{0.__class__.__mro__}", ":id", ":1", "?", "??", "@id", "${id}", "#{id}",
    "`id`",
    # LIKE, regular expressions, patterns
    "%a%", "_", "a_b", ".*", "^", "(a+)+$", "[", "[^a]", "*", "?*", "**", "[a-z]*", "\\*", "{a,b}", "~",
    "!~",
    # arrays, rows, ranges, casts
    "{}", "{NULL}", '{"a","b"}', "{a}'; --", "ARRAY['a']", "(a,b)", "[1,2)", "'{}'::text[]", "a::regclass",
    "::int", "'1'::vector", "[1,2,3]", "[1,2,3]'::vector); --", "0x27", "B'1'", "X'27'",
    # JSON, and paths into it
    '{"a": 1}', '"', '"}', '","admin":true,"x":"', '\\"', "$.a", "$.**", "$[*] ? (@ > 0)", "{a,b}", "a,b",
    "->", "->>", "#>>", "@?", '{"$gt": ""}', "'] || '{}'::jsonb || metadata['", "metadata", "null", "true",
    "__proto__", "constructor.prototype",
    # the operators of `where`, and those of others
    "$eq", "$ne", "$or", "$not", "$where", "$regex", "$expr", "$", "$$ROOT", "$in]", "$gt'", "$exists\n",
    # COPY
    "\\.", "\\N", "a\tb", "a\nb", "\\.\nDROP TABLE chunks;", "PGCOPY\n\xff\r\n", "\n\\.\n",
    # functions and files of the server
    "pg_read_file('/etc/passwd')", "lo_import('/etc/passwd')", "dblink('', 'SELECT 1')",
    "set_config('role', 'x', false)", "current_setting('data_directory')", "pg_sleep(30)",
    "nextval('write_log_id_seq')", "query_to_xml('SELECT 1', true, true, '')", "../../etc/passwd",
    "file:///etc/passwd", "| touch /tmp/owned", "$(touch /tmp/owned)", "; touch /tmp/owned", "\u0430dmin",
    # names of our own
    "embeddings", "chunks", "write_log", "alembic_version", "vectorkeep_documents", "store", "all",
    "source:all", "workspace:all", "source:", "batch", "a#0", "#0", "a#1#2",
    # Redis
    "*\r\n", "\r\nFLUSHALL\r\n", "*1\r\n$8\r\nFLUSHALL\r\n", "$-1\r\n", "a\r\nSET b c\r\n", "vectorkeep:*",
    "vectorkeep:*:g:*", "g:*", "return redis.call('FLUSHALL')", "h[^e]llo", "{hash}tag", "a:b:c", "::",
    ":g:store", "__keyspace@0__:*",
]  # fmt: skip

STRINGS = list(dict.fromkeys([closer + payload for closer in _CLOSERS for payload in _PAYLOADS] + _ALONE))
assert len(STRINGS) >= 200
