-- works_from: 1
--
-- Tables for the search index (QRY-2). flowstore creates the index itself where SQLite has FTS5: see search.py.
-- Writers do not pay for it: when a run ends, a trigger inserts its id into unsearched. Cleanup, searches and
-- "flowstore migrate up" index such runs later, in batches. A search checks the exact condition on all runs
-- whose text has the trigrams, all runs in unsearched and all Running runs, so it returns the same runs as a
-- search without the index.

-- To load many completed runs: insert steps and attempts first, or everything in one transaction, so that no
-- run is indexed without them. Then run "flowstore migrate up", the fastest way to index many runs.

-- The searchable text of a run when it was indexed, with ASCII letters folded. It contains all current text of
-- the run and possibly more, unless the run is Running or in unsearched.
CREATE TABLE run_texts (
    id     INTEGER PRIMARY KEY AUTOINCREMENT, -- never reused: the index may still have entries of a deleted id
    run_id BLOB NOT NULL UNIQUE,
    text   TEXT NOT NULL
) STRICT;

CREATE TABLE unsearched (run_id BLOB NOT NULL PRIMARY KEY) STRICT, WITHOUT ROWID;

-- 1 if the run was indexed, after its end, while the step was still open.
ALTER TABLE steps ADD COLUMN searched_open INTEGER NOT NULL DEFAULT 0;
