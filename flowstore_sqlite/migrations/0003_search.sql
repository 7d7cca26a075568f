-- works_from: 1
--
-- For the index of searches (QRY-2), which flowstore itself makes where this SQLite has FTS5: see search.py.
-- It lies outside of the writers' way: a run that ends leaves its id in unsearched, nothing else, and the
-- text of such runs is gathered later, in batches, by cleanup, by searches themselves and by "flowstore
-- migrate up". A search looks at the texts that hold its trigrams, at every run in unsearched and at every
-- Running one, and then at the runs themselves, so it finds exactly what a look at all would find.

-- To load many runs that are over: steps and attempts first or all in one transaction, so that no text is
-- gathered without them; then "flowstore migrate up", which gathers many quickest.

-- What was found in a run the last time, with ASCII letters folded. It may hold more than the run does now,
-- never less, unless the run is Running or in unsearched.
CREATE TABLE run_texts (
    id     INTEGER PRIMARY KEY AUTOINCREMENT, -- never used again: the index may still hold an old one
    run_id BLOB NOT NULL UNIQUE,
    text   TEXT NOT NULL
) STRICT;

CREATE TABLE unsearched (run_id BLOB NOT NULL PRIMARY KEY) STRICT, WITHOUT ROWID;

-- 1 once a text was gathered while the step was still open in a run that is over.
ALTER TABLE steps ADD COLUMN searched_open INTEGER NOT NULL DEFAULT 0;
