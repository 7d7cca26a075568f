-- works_from: 1
--
-- Tags (TAG). The column has all tags of a run as a JSON object, so that reading a run reads one row; it is NULL
-- without tags. run_tags is the index for finding runs. flowstore writes both in one transaction; to load runs with
-- tags by other means, fill both.
ALTER TABLE runs ADD COLUMN tags TEXT;

CREATE TABLE run_tags (
    run_id     BLOB NOT NULL,
    tag_key    TEXT NOT NULL,
    tag_value  TEXT NOT NULL,
    -- Of the run, so that pages and counts by flow and status read no runs.
    flow_id    BLOB NOT NULL,
    status     TEXT NOT NULL,
    started_at INTEGER NOT NULL,
    PRIMARY KEY (run_id, tag_key)
) STRICT, WITHOUT ROWID;

-- The runs with a tag and a status, in the order of QRY-1.
CREATE INDEX run_tags_by_value ON run_tags (tag_key, tag_value, status, started_at, run_id, flow_id);

-- These triggers serve an older flowstore too, which ends and deletes runs without their tags.
CREATE TRIGGER tag_ended AFTER UPDATE OF status ON runs WHEN NEW.tags IS NOT NULL BEGIN
    UPDATE run_tags SET status = NEW.status WHERE run_id = NEW.run_id;
END;

CREATE TRIGGER forget_tags AFTER DELETE ON runs WHEN OLD.tags IS NOT NULL BEGIN
    DELETE FROM run_tags WHERE run_id = OLD.run_id;
END;
