-- works_from: 1
--
-- Counters for dashboards, updated in the transaction of each change, so that a query costs the same for any
-- number of runs. Triggers update them, so they stay correct when an older flowstore or a bulk load writes. To
-- load many runs, insert into runs (and steps) in one transaction.

-- A page is a range of one of these indexes; without a status it merges the ranges of all four statuses. Index
-- entries end with the primary key run_id.
CREATE INDEX runs_of_status ON runs (status, started_at);
CREATE INDEX runs_of_flow_and_status ON runs (flow_id, status, started_at);
DROP INDEX runs_started;
DROP INDEX runs_of_flow;
DROP INDEX runs_active;

CREATE TABLE run_counts (
    flow_id BLOB NOT NULL,
    status  TEXT NOT NULL,
    amount  INTEGER NOT NULL,
    PRIMARY KEY (flow_id, status)
) STRICT, WITHOUT ROWID;

-- Per UTC day, numbered from 1970-01-01: the runs completed on that day, and the number of changes of runs
-- started on it. That number only rises, so a summary of the day is valid while it is the same. Therefore rows
-- are never deleted.
CREATE TABLE run_days (
    day       INTEGER NOT NULL PRIMARY KEY,
    succeeded INTEGER NOT NULL DEFAULT 0,
    failed    INTEGER NOT NULL DEFAULT 0,
    changes   INTEGER NOT NULL DEFAULT 0
) STRICT;

-- Cached timeseries buckets of whole days, valid while changes equals that of the day. scope is a flow_id, or
-- empty for all flows.
CREATE TABLE run_summaries (
    granularity TEXT NOT NULL,
    scope       BLOB NOT NULL,
    day         INTEGER NOT NULL,
    changes     INTEGER NOT NULL,
    buckets     TEXT NOT NULL,
    PRIMARY KEY (granularity, scope, day)
) STRICT, WITHOUT ROWID;

INSERT INTO run_counts (flow_id, status, amount)
SELECT flow_id, status, COUNT(*) FROM runs GROUP BY flow_id, status;

INSERT INTO run_days (day, changes)
SELECT (started_at - ((started_at % 86400000000) + 86400000000) % 86400000000) / 86400000000, COUNT(*)
FROM runs GROUP BY 1;

INSERT INTO run_days (day, succeeded, failed)
SELECT (completed_at - ((completed_at % 86400000000) + 86400000000) % 86400000000) / 86400000000,
    SUM(status = 'Succeeded'), SUM(status = 'Failed')
FROM runs WHERE completed_at IS NOT NULL GROUP BY 1
ON CONFLICT (day) DO UPDATE SET succeeded = excluded.succeeded, failed = excluded.failed;

-- This division rounds down before 1970 too.
CREATE TRIGGER count_started AFTER INSERT ON runs BEGIN
    INSERT INTO run_counts (flow_id, status, amount) VALUES (NEW.flow_id, NEW.status, 1)
    ON CONFLICT (flow_id, status) DO UPDATE SET amount = amount + 1;
    INSERT INTO run_days (day, changes) VALUES (
        (NEW.started_at - ((NEW.started_at % 86400000000) + 86400000000) % 86400000000) / 86400000000, 1
    ) ON CONFLICT (day) DO UPDATE SET changes = changes + 1;
END;

CREATE TRIGGER count_loaded AFTER INSERT ON runs WHEN NEW.completed_at IS NOT NULL BEGIN
    INSERT INTO run_days (day, succeeded, failed) VALUES (
        (NEW.completed_at - ((NEW.completed_at % 86400000000) + 86400000000) % 86400000000) / 86400000000,
        NEW.status = 'Succeeded', NEW.status = 'Failed'
    ) ON CONFLICT (day) DO UPDATE SET succeeded = succeeded + excluded.succeeded,
        failed = failed + excluded.failed;
END;

CREATE TRIGGER count_deleted AFTER DELETE ON runs BEGIN
    UPDATE run_counts SET amount = amount - 1 WHERE flow_id = OLD.flow_id AND status = OLD.status;
    DELETE FROM run_counts WHERE flow_id = OLD.flow_id AND status = OLD.status AND amount = 0;
    UPDATE run_days SET changes = changes + 1
    WHERE day = (OLD.started_at - ((OLD.started_at % 86400000000) + 86400000000) % 86400000000) / 86400000000;
    UPDATE run_days SET succeeded = succeeded - (OLD.status = 'Succeeded'),
        failed = failed - (OLD.status = 'Failed')
    WHERE day
        = (OLD.completed_at - ((OLD.completed_at % 86400000000) + 86400000000) % 86400000000) / 86400000000;
END;

-- The store updates status and completed_at of a run, never its flow or its start.
CREATE TRIGGER count_changed AFTER UPDATE OF status, completed_at ON runs BEGIN
    UPDATE run_counts SET amount = amount - 1 WHERE flow_id = OLD.flow_id AND status = OLD.status;
    INSERT INTO run_counts (flow_id, status, amount) VALUES (NEW.flow_id, NEW.status, 1)
    ON CONFLICT (flow_id, status) DO UPDATE SET amount = amount + 1;
    UPDATE run_days SET changes = changes + 1
    WHERE day = (NEW.started_at - ((NEW.started_at % 86400000000) + 86400000000) % 86400000000) / 86400000000;
    UPDATE run_days SET succeeded = succeeded - (OLD.status = 'Succeeded'),
        failed = failed - (OLD.status = 'Failed')
    WHERE day
        = (OLD.completed_at - ((OLD.completed_at % 86400000000) + 86400000000) % 86400000000) / 86400000000;
    INSERT INTO run_days (day, succeeded, failed)
    SELECT (NEW.completed_at - ((NEW.completed_at % 86400000000) + 86400000000) % 86400000000) / 86400000000,
        NEW.status = 'Succeeded', NEW.status = 'Failed'
    WHERE NEW.completed_at IS NOT NULL
    ON CONFLICT (day) DO UPDATE SET succeeded = succeeded + excluded.succeeded,
        failed = failed + excluded.failed;
END;
